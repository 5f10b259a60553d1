//! Who waits for admission, and whose turn it is: priorities, fairness between tenants, deadlines.
//!
//! - **Priority** comes first: of two classes the one with the smaller number is served.
//! - **Fairness** within a class: each tenant has a counter of the tokens that it was served, divided by
//!   its weight, and the tenant with the smallest is next (the virtual token counter of Sheng et al.,
//!   *Fairness in Serving Large Language Models*, OSDI 2024). A tenant that comes back from a pause is
//!   lifted to the others: a pause saves nothing up. It is work-conserving: nobody's share stays unused.
//! - **Deadlines** within a tenant: earliest first, and who cannot make it any more behind all who can.
//! - **Nobody starves**: each [`OLDEST_EVERY`]th to be admitted is the one that has waited longest,
//!   whatever its class and tenant. Who is behind `n` others is admitted within `OLDEST_EVERY·(n + 1)`
//!   admissions.
//! - **Bounded**: when it is full, somebody of the lowest class goes; within that class, of the tenant
//!   that has most waiting. A tenant that floods it pushes out its own requests.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use crate::request::RequestKey;

/// See above: one in so many goes to the longest waiting.
pub const OLDEST_EVERY: u64 = 8;
/// An output token costs a tenant as much as so many of its prompt's, as in the paper above.
pub const OUTPUT_TOKEN_WEIGHT: f64 = 2.0;
/// Counters of tenants that have nothing waiting are forgotten beyond so many.
const MAX_ACCOUNTS: usize = 10_000;

/// Whether, and how, requests wait here for their turn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdmissionSettings {
    /// More than these are not kept waiting.
    pub max_waiting: usize,
    /// Who waited so long is turned away.
    pub max_wait: Duration,
    /// Requests are admitted as long as some worker has less than this before them.
    pub backlog: Duration,
    /// Requests of this priority and of larger numbers are turned away at once if no path is predicted
    /// to give a first token in time.
    pub early_rejection: Option<i32>,
}

impl Default for AdmissionSettings {
    fn default() -> Self {
        Self {
            max_waiting: 10_000,
            max_wait: Duration::from_secs(60),
            backlog: Duration::from_secs(1),
            early_rejection: None,
        }
    }
}

/// On whose behalf a request comes.
#[derive(Clone, Debug, PartialEq)]
pub struct Tenant {
    pub name: Arc<str>,
    /// Its share beside the others', above 0.
    pub weight: f64,
}

impl Default for Tenant {
    fn default() -> Self {
        Self { name: Arc::from("default"), weight: 1.0 }
    }
}

/// Why a request was turned away for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ShedReason {
    /// There is no room to wait in, and others come before it.
    QueueFull,
    WaitedTooLong,
    /// No path is predicted to give a first token in time.
    CannotMeetSlo,
}

impl ShedReason {
    /// A name for metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::QueueFull => "queue_full",
            Self::WaitedTooLong => "waited_too_long",
            Self::CannotMeetSlo => "cannot_meet_slo",
        }
    }
}

/// Tokens served to each tenant, by its weight.
#[derive(Debug, Default)]
pub(crate) struct Accounts {
    served: HashMap<Arc<str>, f64>,
    /// What the tenant had that was admitted last.
    floor: f64,
}

impl Accounts {
    pub(crate) fn charge(&mut self, tenant: &Tenant, tokens: f64) {
        if let Some(served) = self.served.get_mut(&tenant.name) {
            *served += tokens / tenant.weight.max(1e-9);
        } else {
            if self.served.len() >= MAX_ACCOUNTS {
                let floor = self.floor;
                // Whoever is below it would be lifted to it anyway.
                self.served.retain(|_, served| *served > floor);
            }
            if self.served.len() < 2 * MAX_ACCOUNTS {
                let served = self.floor + tokens / tenant.weight.max(1e-9);
                self.served.insert(tenant.name.clone(), served);
            }
        }
    }

    fn of(&self, tenant: &str) -> f64 {
        self.served.get(tenant).copied().unwrap_or(self.floor)
    }

    /// A tenant has something waiting again, beside `others`.
    fn lift<'a>(&mut self, tenant: &Arc<str>, others: impl Iterator<Item = &'a Arc<str>>) {
        let least = others.map(|other| self.of(other)).min_by(f64::total_cmp);
        let least = least.unwrap_or(self.floor);
        let served = self.served.entry(tenant.clone()).or_insert(least);
        *served = served.max(least);
    }
}

/// One that waits.
#[derive(Clone, Debug)]
pub(crate) struct Waits {
    pub(crate) priority: i32,
    pub(crate) tenant: Arc<str>,
    /// When its first token is due; when it came, where all are served as they come.
    pub(crate) due: Duration,
    /// What its prefill takes alone, predicted.
    pub(crate) alone_ms: f64,
}

/// Those who wait for one model.
#[derive(Debug, Default)]
pub(crate) struct WaitingRoom {
    entries: BTreeMap<RequestKey, (u64, Waits)>,
    by_age: BTreeMap<u64, RequestKey>,
    classes: BTreeMap<i32, Class>,
    /// How many each tenant has.
    tenants: BTreeMap<Arc<str>, usize>,
    arrivals: u64,
    admitted: u64,
}

#[derive(Debug, Default)]
struct Class {
    lines: BTreeMap<Arc<str>, Line>,
    alone_ms: f64,
}

/// One tenant's requests of one class.
#[derive(Debug, Default)]
struct Line {
    on_time: BTreeSet<(Duration, RequestKey)>,
    /// In the order of their arrival.
    late: BTreeSet<(u64, RequestKey)>,
}

impl Line {
    fn len(&self) -> usize {
        self.on_time.len() + self.late.len()
    }
}

impl WaitingRoom {
    pub(crate) fn push(&mut self, key: RequestKey, waits: Waits, accounts: &mut Accounts) {
        let count = self.tenants.entry(waits.tenant.clone()).or_default();
        *count += 1;
        if *count == 1 {
            let others = self.tenants.keys().filter(|other| **other != waits.tenant);
            accounts.lift(&waits.tenant, others);
        }
        self.arrivals += 1;
        self.by_age.insert(self.arrivals, key);
        let class = self.classes.entry(waits.priority).or_default();
        class.alone_ms += waits.alone_ms;
        let line = class.lines.entry(waits.tenant.clone()).or_default();
        line.on_time.insert((waits.due, key));
        self.entries.insert(key, (self.arrivals, waits));
    }

    /// Whose turn it is. It stays until it is [admitted](Self::admit).
    pub(crate) fn next(
        &mut self,
        accounts: &Accounts,
        is_late: impl Fn(&Waits) -> bool,
    ) -> Option<RequestKey> {
        if (self.admitted + 1).is_multiple_of(OLDEST_EVERY) {
            return self.by_age.values().next().copied();
        }
        let (_, class) = self.classes.iter_mut().next()?;
        let (_, line) = class
            .lines
            .iter_mut()
            .min_by(|(a, _), (b, _)| accounts.of(a).total_cmp(&accounts.of(b)))?;
        while let Some(&(due, key)) = line.on_time.first() {
            let (age, waits) = self.entries.get(&key)?;
            if !is_late(waits) {
                return Some(key);
            }
            line.on_time.remove(&(due, key));
            line.late.insert((*age, key));
        }
        line.late.first().map(|(_, key)| *key)
    }

    /// It goes on to a worker.
    pub(crate) fn admit(&mut self, key: RequestKey, accounts: &mut Accounts) -> Option<Waits> {
        let waits = self.remove(key)?;
        self.admitted += 1;
        accounts.floor = accounts.floor.max(accounts.of(&waits.tenant));
        Some(waits)
    }

    pub(crate) fn remove(&mut self, key: RequestKey) -> Option<Waits> {
        let (age, waits) = self.entries.remove(&key)?;
        self.by_age.remove(&age);
        if let Some(class) = self.classes.get_mut(&waits.priority) {
            class.alone_ms -= waits.alone_ms;
            if let Some(line) = class.lines.get_mut(&waits.tenant) {
                let _ = line.on_time.remove(&(waits.due, key)) || line.late.remove(&(age, key));
                if line.len() == 0 {
                    class.lines.remove(&waits.tenant);
                }
            }
            if class.lines.is_empty() {
                self.classes.remove(&waits.priority);
            }
        }
        if let Some(count) = self.tenants.get_mut(&waits.tenant) {
            *count -= 1;
            if *count == 0 {
                self.tenants.remove(&waits.tenant);
            }
        }
        Some(waits)
    }

    /// Who has to go so that one more of this class and tenant can come; `None` if that one has to.
    pub(crate) fn gives_way(&self, priority: i32, tenant: &str) -> Option<RequestKey> {
        let (lowest, Class { lines, .. }) = self.classes.iter().next_back()?;
        if *lowest < priority {
            return None;
        }
        let (most, line) = lines.iter().max_by_key(|(_, line)| line.len())?;
        let own = lines.get(tenant).map_or(0, Line::len);
        if *lowest == priority && (**most == *tenant || line.len() <= own + 1) {
            return None;
        }
        let last_late = line.late.last().map(|(_, key)| *key);
        last_late.or_else(|| line.on_time.last().map(|(_, key)| *key))
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Milliseconds of prefill that wait and are of this class or come before it.
    pub(crate) fn alone_ms(&self, priority: i32) -> f64 {
        self.classes.range(..=priority).map(|(_, class)| class.alone_ms).sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn waits(priority: i32, tenant: &str, due: u32) -> Waits {
        let (tenant, due) = (Arc::from(tenant), due * SECOND);
        Waits { priority, tenant, due, alone_ms: 1.0 }
    }

    /// A room that never has anybody late, and whom it serves.
    #[derive(Default)]
    struct Fixture {
        room: WaitingRoom,
        accounts: Accounts,
        keys: u64,
    }

    impl Fixture {
        fn push(&mut self, waits: Waits) -> RequestKey {
            self.keys += 1;
            let key = RequestKey(self.keys);
            self.room.push(key, waits, &mut self.accounts);
            key
        }

        fn serve(&mut self, weight: f64, tokens: f64) -> Option<(RequestKey, Waits)> {
            let key = self.room.next(&self.accounts, |_| false)?;
            let waits = self.room.admit(key, &mut self.accounts)?;
            let tenant = Tenant { name: waits.tenant.clone(), weight };
            self.accounts.charge(&tenant, tokens);
            Some((key, waits))
        }
    }

    #[test]
    fn the_earliest_deadline_of_the_first_class_is_next_and_who_is_late_comes_last() {
        let mut f = Fixture::default();
        let low = f.push(waits(5, "a", 1));
        assert_eq!([0, 5].map(|class| f.room.alone_ms(class)), [0.0, 1.0]);
        let late = f.push(waits(0, "a", 2));
        let second = f.push(waits(0, "a", 9));
        let first = f.push(waits(0, "a", 8));
        for expected in [first, second, late, low] {
            let key = f.room.next(&f.accounts, |waits| waits.due < 3 * SECOND).unwrap();
            assert_eq!(key, expected);
            f.room.admit(key, &mut f.accounts);
        }
        assert!(f.room.is_empty() && f.room.classes.is_empty() && f.room.by_age.is_empty());
    }

    #[test]
    fn a_tenant_that_paused_has_saved_nothing_up() {
        let mut f = Fixture::default();
        for _ in 0..40 {
            f.push(waits(0, "busy", 1));
        }
        for _ in 0..20 {
            f.serve(1.0, 100.0);
        }
        for _ in 0..40 {
            f.push(waits(0, "idle", 1));
        }
        let served: Vec<_> = (0..20).map(|_| f.serve(1.0, 100.0).unwrap().1.tenant).collect();
        let idle = served.iter().filter(|tenant| &***tenant == "idle").count();
        assert!((9..=12).contains(&idle), "{idle} of 20");
    }

    #[test]
    fn who_floods_a_full_room_pushes_out_his_own() {
        let mut f = Fixture::default();
        let mut last = None;
        for due in 0..10 {
            last = Some(f.push(waits(0, "flood", due)));
        }
        assert_eq!(f.room.gives_way(0, "flood"), None, "the newcomer himself");
        assert_eq!(f.room.gives_way(0, "other"), last);
        assert_eq!(f.room.gives_way(1, "other"), None, "a lower class pushes nobody out");
        let low = f.push(waits(3, "other", 0));
        assert_eq!(f.room.gives_way(0, "flood"), Some(low), "the lowest class goes first");
    }

    proptest! {
        /// Two tenants that always have something waiting are served tokens by their weights: their
        /// counters stay within a few requests of each other.
        #[test]
        fn shares_are_by_weight(
            weight in 1..5u32,
            sizes in prop::collection::vec((10..200u32, 10..200u32), 200..400),
        ) {
            let mut f = Fixture::default();
            for due in 0..200 {
                f.push(waits(0, "a", due));
                f.push(waits(0, "b", due));
            }
            let mut served = [0.0, 0.0];
            for (a, b) in &sizes {
                let key = f.room.next(&f.accounts, |_| false).unwrap();
                let waits = f.room.admit(key, &mut f.accounts).unwrap();
                let (which, tokens, weight) = if &*waits.tenant == "a" {
                    (0, f64::from(*a), f64::from(weight))
                } else {
                    (1, f64::from(*b), 1.0)
                };
                let tenant = Tenant { name: waits.tenant.clone(), weight };
                f.accounts.charge(&tenant, tokens);
                served[which] += tokens / weight;
                f.push(Waits { due: waits.due + 300 * SECOND, ..waits });
            }
            prop_assert!((served[0] - served[1]).abs() <= 4.0 * 200.0, "{served:?}");
        }

        /// Whoever waits is admitted in the end, whatever comes after him.
        #[test]
        fn nobody_starves(
            before in prop::collection::vec((-3..3i32, 0..4u8), 0..30),
            after in prop::collection::vec((-3..3i32, 0..4u8), 600),
        ) {
            let mut f = Fixture::default();
            for (priority, tenant) in &before {
                f.push(waits(*priority, &tenant.to_string(), 1));
            }
            let victim = f.push(waits(9, "victim", 1000));
            let bound = OLDEST_EVERY * (before.len() as u64 + 1);
            let mut turns = 0;
            for (priority, tenant) in after {
                f.push(waits(priority, &tenant.to_string(), 0));
                turns += 1;
                if f.serve(1.0, 50.0).unwrap().0 == victim {
                    prop_assert!(turns <= bound, "{turns} > {bound}");
                    return Ok(());
                }
            }
            prop_assert!(false, "never");
        }

        /// Nothing is lost, and a full room never prefers a lower class to a higher one.
        #[test]
        fn who_gives_way_is_of_the_lowest_class(
            pushes in prop::collection::vec((-3..3i32, 0..4u8, 0..50u32), 1..100),
            newcomer in -3..3i32,
        ) {
            let mut f = Fixture::default();
            for (priority, tenant, due) in &pushes {
                f.push(waits(*priority, &tenant.to_string(), *due));
            }
            let lowest = pushes.iter().map(|(priority, ..)| *priority).max().unwrap();
            if let Some(key) = f.room.gives_way(newcomer, "other") {
                let waits = f.room.remove(key).unwrap();
                prop_assert_eq!(waits.priority, lowest);
                prop_assert!(newcomer <= lowest);
                prop_assert_eq!(f.room.len(), pushes.len() - 1);
            } else {
                prop_assert!(newcomer >= lowest);
            }
            let lines = f.room.classes.values().flat_map(|class| class.lines.values());
            prop_assert_eq!(lines.map(Line::len).sum::<usize>(), f.room.len());
        }
    }
}
