//! A TOML document in which every complaint finds its line.

use std::{collections::BTreeSet, ops::Range, path::Path};

use serde_spanned::Spanned;
use toml::de::{DeTable, DeValue};

use crate::{
    error::ConfigError,
    keys::{Absence, Key},
};

/// One table, and where it stands.
#[derive(Clone, Debug)]
pub(crate) struct Place<'d> {
    /// `worker[1].engine`; empty for the whole document.
    pub(crate) path: String,
    /// Of its header.
    pub(crate) offset: usize,
    pub(crate) table: &'d DeTable<'d>,
}

impl<'d> Place<'d> {
    pub(crate) fn key_path(&self, key: &str) -> String {
        let bare = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
        let key = if !key.is_empty() && key.chars().all(bare) {
            key.to_owned()
        } else {
            format!("{key:?}")
        };
        if self.path.is_empty() { key } else { format!("{}.{key}", self.path) }
    }

    pub(crate) fn get(&self, key: &str) -> Option<&'d Spanned<DeValue<'d>>> {
        self.table.get(key)
    }
}

/// Reads one text and collects every complaint about it.
pub(crate) struct Reader<'t> {
    text: &'t str,
    /// Relative paths are taken from it.
    base: &'t Path,
    errors: BTreeSet<ConfigError>,
    /// Lines that are not TOML. What else is wrong with them, nobody can say.
    unreadable: BTreeSet<usize>,
}

impl<'t> Reader<'t> {
    pub(crate) fn new(text: &'t str, base: &'t Path, syntax: &[toml::de::Error]) -> Self {
        let mut reader = Self { text, base, errors: BTreeSet::new(), unreadable: BTreeSet::new() };
        for error in syntax {
            let line = reader.line(error.span().map_or(0, |span| span.start));
            reader.unreadable.insert(line);
            let message = error.message().to_owned();
            reader.errors.insert(ConfigError { line: Some(line), key: String::new(), message });
        }
        reader
    }

    pub(crate) fn line(&self, offset: usize) -> usize {
        let before = self.text.as_bytes().get(..offset).unwrap_or(self.text.as_bytes());
        1 + before.iter().filter(|byte| **byte == b'\n').count()
    }

    pub(crate) fn add(&mut self, offset: usize, key: String, message: impl Into<String>) {
        let line = self.line(offset);
        if !self.unreadable.contains(&line) {
            self.errors.insert(ConfigError { line: Some(line), key, message: message.into() });
        }
    }

    /// For what is not there, unless it may stand on a line that cannot be read.
    pub(crate) fn add_missing(&mut self, offset: usize, key: String, message: impl Into<String>) {
        if self.unreadable.is_empty() {
            self.add(offset, key, message);
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.errors.is_empty()
    }

    /// In the order of their lines.
    pub(crate) fn into_errors(self) -> Vec<ConfigError> {
        self.errors.into_iter().collect()
    }

    /// The value as the user wrote it, on one line and not longer than people read.
    pub(crate) fn shown(&self, span: Range<usize>, value: &DeValue<'_>) -> String {
        const LONGEST_CHARS: usize = 60;
        if value.is_table() {
            return "a table".to_owned();
        }
        let written = self.text.get(span).unwrap_or_default();
        let mut line = written.split_whitespace().collect::<Vec<_>>().join(" ");
        if let Some((end, _)) = line.char_indices().nth(LONGEST_CHARS) {
            line.truncate(end);
            line.push('…');
        }
        line
    }

    /// Reads all keys of a table into `section`. `tables` are known keys that others read, `skipped`
    /// those of which something else was said already.
    pub(crate) fn read_keys<T>(
        &mut self,
        place: &Place<'_>,
        keys: &[Key<T>],
        tables: &[&str],
        skipped: &[&str],
        section: &mut T,
    ) {
        for (name, value) in place.table {
            let (text, offset) = (name.get_ref().as_ref(), name.span().start);
            match keys.iter().find(|key| key.name == text) {
                Some(key) => {
                    let span = value.span();
                    if let Err(wanted) = (key.read)(section, value.get_ref(), self.base) {
                        let shown = self.shown(span.clone(), value.get_ref());
                        let message = format!("{shown} is not {wanted}");
                        self.add(span.start, place.key_path(key.name), message);
                    }
                }
                None if tables.contains(&text) || skipped.contains(&text) => {}
                None => {
                    let known = keys.iter().map(|key| key.name).chain(tables.iter().copied());
                    self.add(offset, place.key_path(text), unknown(text, known));
                }
            }
        }
        for key in keys {
            if let Absence::Required(example) = key.absence
                && place.get(key.name).is_none()
            {
                let message = format!("missing; for example {} = {example}", key.name);
                self.add_missing(place.offset, place.key_path(key.name), message);
            }
        }
    }

    /// The table below `place` that is called `name`, if there is one.
    pub(crate) fn table<'d>(&mut self, place: &Place<'d>, name: &str) -> Option<Place<'d>> {
        let value = place.get(name)?;
        let span = value.span();
        match value.get_ref() {
            DeValue::Table(table) => {
                Some(Place { path: place.key_path(name), offset: span.start, table })
            }
            other => {
                let message = format!("{} is not a table", self.shown(span.clone(), other));
                self.add(span.start, place.key_path(name), message);
                None
            }
        }
    }

    /// The tables of `[[name]]`.
    pub(crate) fn tables<'d>(&mut self, place: &Place<'d>, name: &str) -> Vec<Place<'d>> {
        let Some(value) = place.get(name) else { return Vec::new() };
        let wanted = format!("tables, each under its own [[{name}]]");
        let Some(items) = value.get_ref().as_array() else {
            let found = match value.get_ref() {
                DeValue::Table(_) => "one table".to_owned(),
                other => self.shown(value.span(), other),
            };
            let message = format!("{found} is not a list of {wanted}");
            self.add(value.span().start, place.key_path(name), message);
            return Vec::new();
        };
        let mut places = Vec::new();
        for (index, item) in items.iter().enumerate() {
            let path = format!("{}[{index}]", place.key_path(name));
            let offset = item.span().start;
            match item.get_ref() {
                DeValue::Table(table) => places.push(Place { path, offset, table }),
                other => {
                    let message = format!("{} is not a table", self.shown(item.span(), other));
                    self.add(offset, path, message);
                }
            }
        }
        places
    }
}

/// The known name that is most like what was written, if one is alike at all.
pub fn nearest<'k>(name: &str, known: impl IntoIterator<Item = &'k str>) -> Option<&'k str> {
    const LIKENESS: f64 = 0.7;
    known
        .into_iter()
        .map(|key| (strsim::jaro_winkler(name, key), key))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .filter(|(likeness, _)| *likeness >= LIKENESS)
        .map(|(_, key)| key)
}

/// Names the known key that is nearest to what was written.
pub fn unknown<'k>(name: &str, known: impl IntoIterator<Item = &'k str> + Clone) -> String {
    match nearest(name, known.clone()) {
        Some(key) => format!("unknown key; did you mean {key:?}?"),
        None => {
            let known: Vec<_> = known.into_iter().collect();
            format!("unknown key; known here: {}", known.join(", "))
        }
    }
}
