//! Names, and choices among some.

use std::{marker::PhantomData, path::Path};

use baton_types::Role;
use toml::de::DeValue;

use super::{Codec, list, quoted, text};
use crate::cluster::{
    BalancerActuator, CheckChoice, LateRequests, OnNoPrefill, PlacementMode, Requirement,
    TransportChoice,
};

pub(crate) const NAME: &str = "a name of at most 63 letters, digits, \"-\", \"_\" and \".\"";

pub(crate) fn is_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    (1..=63).contains(&name.len()) && name.chars().all(allowed)
}

/// Names stand in HTTP headers and metric labels.
pub(crate) struct Name;

impl Codec for Name {
    type Value = String;

    fn read(value: &DeValue<'_>, _: &Path) -> Result<String, String> {
        text(value).filter(|name| is_name(name)).map(str::to_owned).ok_or_else(|| NAME.to_owned())
    }

    fn write(value: &String) -> Option<String> {
        Some(quoted(value))
    }
}

/// A name, or what many begin with.
pub(crate) struct NameOrStart;

impl Codec for NameOrStart {
    type Value = String;

    fn read(value: &DeValue<'_>, base: &Path) -> Result<String, String> {
        Name::read(value, base).or_else(|wanted| {
            text(value)
                .filter(|name| name.strip_suffix('*').is_some_and(is_name))
                .map(str::to_owned)
                .ok_or_else(|| format!("{wanted}, or the start of such names and \"*\""))
        })
    }

    fn write(value: &String) -> Option<String> {
        Some(quoted(value))
    }
}

pub(crate) struct RoleName;

impl Codec for RoleName {
    type Value = Role;

    fn read(value: &DeValue<'_>, _: &Path) -> Result<Role, String> {
        text(value)
            .and_then(|name| name.parse().ok())
            .ok_or_else(|| "\"prefill\" or \"decode\"".to_owned())
    }

    fn write(value: &Role) -> Option<String> {
        Some(quoted(value.as_str()))
    }
}

/// One of several values that have names.
pub(crate) trait Named: Copy + PartialEq + 'static {
    const NAMES: &'static [(&'static str, Self)];
    /// What whoever wants something else should know.
    const BESIDES: &'static str = "";
}

pub(crate) struct OneOf<T>(PhantomData<T>);

impl<T: Named> Codec for OneOf<T> {
    type Value = T;

    fn read(value: &DeValue<'_>, _: &Path) -> Result<T, String> {
        let named = |text: &str| T::NAMES.iter().find(|(name, _)| *name == text);
        let wanted = || one_of(&T::NAMES.iter().map(|(name, _)| *name).collect::<Vec<_>>());
        let refused = || wanted() + T::BESIDES;
        text(value).and_then(named).map(|(_, value)| *value).ok_or_else(refused)
    }

    fn write(value: &T) -> Option<String> {
        T::NAMES.iter().find(|(_, one)| one == value).map(|(name, _)| quoted(name))
    }
}

impl Named for TransportChoice {
    const NAMES: &'static [(&'static str, Self)] =
        &[("auto", Self::Auto), ("quic", Self::Quic), ("ucx", Self::Ucx), ("shm", Self::Shm)];
}

impl Named for CheckChoice {
    const NAMES: &'static [(&'static str, Self)] = &[("crc", Self::Crc), ("blake3", Self::Blake3)];
    const BESIDES: &'static str = "; verification cannot be turned off";
}

impl Named for PlacementMode {
    const NAMES: &'static [(&'static str, Self)] =
        &[("adaptive", Self::Adaptive), ("always", Self::Always), ("never", Self::Never)];
}

impl Named for OnNoPrefill {
    const NAMES: &'static [(&'static str, Self)] =
        &[("reject", Self::Reject), ("local", Self::Local)];
}

impl Named for LateRequests {
    const NAMES: &'static [(&'static str, Self)] = &[("last", Self::Last), ("fifo", Self::Fifo)];
}

/// The name of an HTTP header.
pub(crate) struct HeaderName;

impl Codec for HeaderName {
    type Value = String;

    fn read(value: &DeValue<'_>, _: &Path) -> Result<String, String> {
        text(value)
            .filter(|name| name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-'))
            .map(str::to_ascii_lowercase)
            .ok_or_else(|| "the name of a header, such as \"x-tenant\"".to_owned())
    }

    fn write(value: &String) -> Option<String> {
        Some(quoted(value))
    }
}

pub(crate) struct ActuatorName;

impl Codec for ActuatorName {
    type Value = BalancerActuator;

    fn read(value: &DeValue<'_>, _: &Path) -> Result<BalancerActuator, String> {
        let named = |name: &str| BalancerActuator::ALL.into_iter().find(|one| one.as_str() == name);
        let wanted = || one_of(&BalancerActuator::ALL.map(BalancerActuator::as_str));
        text(value).and_then(named).ok_or_else(wanted)
    }

    fn write(value: &BalancerActuator) -> Option<String> {
        Some(quoted(value.as_str()))
    }
}

pub(crate) struct Requirements;

impl Codec for Requirements {
    type Value = Vec<Requirement>;

    fn read(value: &DeValue<'_>, _: &Path) -> Result<Vec<Requirement>, String> {
        let named = |name: &str| Requirement::ALL.into_iter().find(|one| one.as_str() == name);
        let wanted = || format!("a list of {}", one_of(&Requirement::ALL.map(Requirement::as_str)));
        let items = value.as_array().ok_or_else(wanted)?;
        let read = items.iter().map(|item| item.get_ref().as_str().and_then(named));
        read.collect::<Option<_>>().ok_or_else(wanted)
    }

    fn write(value: &Vec<Requirement>) -> Option<String> {
        let names: Vec<String> = value.iter().map(|one| one.as_str().to_owned()).collect();
        (!names.is_empty()).then(|| list(&names))
    }
}

/// `"a", "b" or "c"`
fn one_of(names: &[&str]) -> String {
    let names: Vec<String> = names.iter().map(|name| quoted(name)).collect();
    match names.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, others)) => format!("{} or {last}", others.join(", ")),
        None => String::new(),
    }
}
