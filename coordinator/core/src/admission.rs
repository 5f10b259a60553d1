//! Who waits for admission, and whose turn it is: priorities, fairness between tenants, deadlines.
//!
//! - **Priority** comes first: of two classes the one with the smaller number is served.
//! - **Fairness** within a class: each tenant has a counter of the tokens that it was served, divided by
//!   its weight, and the tenant with the smallest is next (the virtual token counter of Sheng et al.,
//!   *Fairness in Serving Large Language Models*, OSDI 2024). A tenant that comes back from a pause is
//!   lifted to the others: a pause saves nothing up. It is work-conserving: nobody's share stays unused.
//! - **Deadlines** within a tenant: earliest first, and who cannot make it any more behind all who can.
//! - **Nobody starves**: of each [`OLDEST_EVERY`] prompt tokens that are admitted one is of those that have waited
//!   longest, whatever their class and tenant, late or not. Who has `n` tokens, those of all who came before
//!   included, is admitted before some `OLDEST_EVERY·n` others.
//! - **Bounded**: when it is full, somebody of the lowest class goes; within that class, of the tenant
//!   that has most waiting. A tenant that floods it pushes out its own requests.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use crate::{queue::Order, request::RequestKey};

/// See above: one token in so many is of the longest waiting. Those are late mostly, and long, and a token of a long
/// prompt costs more than others: what others lose is rather more than that part.
pub const OLDEST_EVERY: u64 = 64;
/// An output token costs a tenant as much as so many of its prompt's, as in the paper above.
pub const OUTPUT_TOKEN_WEIGHT: f64 = 2.0;
/// Of the TTFT's target, where turns go by deadline. With less of it who is placed is placed knowing more; with much
/// less, long prompts lose.
const BACKLOG_PART: f64 = 0.2;
/// Where all are served as they come. Nothing is gained by waiting here, and something lost: in one queue nobody
/// overtakes, so that in a burst all are late alike. With this before every worker nobody can be in time any more.
const BACKLOG_PART_AS_THEY_COME: f64 = 2.0;
/// Counters of tenants that have nothing waiting are forgotten beyond so many.
const MAX_ACCOUNTS: usize = 10_000;

/// Whether, and how, requests wait here for their turn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdmissionSettings {
    /// More than these are not kept waiting.
    pub max_waiting: usize,
    /// Who waited so long is turned away.
    pub max_wait: Duration,
    /// Requests are admitted as long as some worker has less than this before them, those that are late as long as
    /// one has nothing.
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

impl AdmissionSettings {
    /// The backlog of workers that shall give first tokens within `ttft`: enough that none is idle, and little enough
    /// that the rest is in time.
    pub fn backlog_within(ttft: Duration, order: Order) -> Duration {
        ttft.mul_f64(match order {
            Order::Arrival => BACKLOG_PART_AS_THEY_COME,
            Order::LateLast => BACKLOG_PART,
        })
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
    pub const ALL: [Self; 3] = [Self::QueueFull, Self::WaitedTooLong, Self::CannotMeetSlo];

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
    pub(crate) arrived: Duration,
    /// Its place among those that are on time: the smallest is served first.
    pub(crate) turn: Duration,
    /// When its first token is due.
    pub(crate) due: Duration,
    pub(crate) prompt_tokens: u32,
    /// What its prefill takes alone, predicted.
    pub(crate) alone_ms: f64,
    pub(crate) is_long: bool,
    /// It is served after all who can still make it.
    pub(crate) is_late: bool,
}

/// By what a request has its turn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Turn {
    /// It may still make its deadline, and if it does not after all it gives the turn back.
    #[default]
    OnTime,
    /// It is late, and of its class and tenant nobody waits who is not.
    Late,
    /// It has waited longest of all.
    Oldest,
}

/// Of which prompts one may have its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Among {
    All,
    NotLong,
}

/// Those who wait for one model.
#[derive(Debug, Default)]
pub(crate) struct WaitingRoom {
    entries: BTreeMap<RequestKey, Waits>,
    by_age: BTreeSet<(Duration, RequestKey)>,
    classes: BTreeMap<i32, Class>,
    /// How many each tenant has.
    tenants: BTreeMap<Arc<str>, usize>,
    alone_ms: f64,
    /// Prompt tokens that were admitted since the longest waiting was.
    admitted_tokens: u64,
}

#[derive(Debug, Default)]
struct Class {
    lines: BTreeMap<Arc<str>, Line>,
    /// Of those that are on time.
    alone_ms: f64,
}

/// One tenant's requests of one class.
#[derive(Debug, Default)]
struct Line {
    others: Lane,
    long: Lane,
}

#[derive(Debug, Default)]
struct Lane {
    /// In the order of their turns.
    on_time: BTreeSet<(Duration, RequestKey)>,
    /// In the order of their arrival.
    late: BTreeSet<(Duration, RequestKey)>,
}

impl Line {
    fn lane(&mut self, is_long: bool) -> &mut Lane {
        if is_long { &mut self.long } else { &mut self.others }
    }

    fn len(&self) -> usize {
        self.others.len() + self.long.len()
    }

    fn has(&self, of: Among) -> bool {
        self.others.len() > 0 || (of == Among::All && self.long.len() > 0)
    }

    /// The first of both, and by what it has its turn.
    fn first(&self, of: Among) -> Option<(RequestKey, Turn)> {
        let lanes = [Some(&self.others), (of == Among::All).then_some(&self.long)];
        let first = |of: fn(&Lane) -> &BTreeSet<(Duration, RequestKey)>| {
            let first = lanes.iter().flatten().filter_map(|lane| of(lane).first()).min();
            first.map(|(_, key)| *key)
        };
        let on_time = first(|lane| &lane.on_time).map(|key| (key, Turn::OnTime));
        on_time.or_else(|| first(|lane| &lane.late).map(|key| (key, Turn::Late)))
    }

    /// Who comes last of both.
    fn last(&self) -> Option<RequestKey> {
        let lanes = [&self.others, &self.long];
        let late = lanes.iter().filter_map(|lane| lane.late.last()).max();
        let last = late.or_else(|| lanes.iter().filter_map(|lane| lane.on_time.last()).max());
        last.map(|(_, key)| *key)
    }
}

impl Lane {
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
        self.by_age.insert((waits.arrived, key));
        self.alone_ms += waits.alone_ms;
        let class = self.classes.entry(waits.priority).or_default();
        let line = class.lines.entry(waits.tenant.clone()).or_default();
        let lane = line.lane(waits.is_long);
        if waits.is_late {
            lane.late.insert((waits.arrived, key));
        } else {
            class.alone_ms += waits.alone_ms;
            lane.on_time.insert((waits.turn, key));
        }
        self.entries.insert(key, waits);
    }

    /// Whose turn it is. It stays until it is [admitted](Self::admit). Who is found late is set behind the others of
    /// its class and tenant, once.
    pub(crate) fn next(
        &mut self,
        accounts: &Accounts,
        of: Among,
        is_late: impl FnMut(&Waits) -> bool,
    ) -> Option<(RequestKey, Turn)> {
        let next = self.first_of_line(accounts, of, is_late)?;
        let (_, oldest) = *self.by_age.first()?;
        let waits = self.entries.get(&oldest)?;
        let is_owed = self.admitted_tokens >= OLDEST_EVERY * u64::from(waits.prompt_tokens);
        Some(if is_owed && oldest != next.0 { (oldest, Turn::Oldest) } else { next })
    }

    fn first_of_line(
        &mut self,
        accounts: &Accounts,
        of: Among,
        mut is_late: impl FnMut(&Waits) -> bool,
    ) -> Option<(RequestKey, Turn)> {
        let (alone_ms, line) =
            self.classes.values_mut().find_map(|Class { lines, alone_ms }| {
                let lines = lines.iter_mut().filter(|(_, line)| line.has(of));
                let line = lines.min_by(|(a, _), (b, _)| accounts.of(a).total_cmp(&accounts.of(b)));
                line.map(|(_, line)| (alone_ms, line))
            })?;
        let lanes = [Some(&mut line.others), (of == Among::All).then_some(&mut line.long)];
        for lane in lanes.into_iter().flatten() {
            while let Some(&(turn, key)) = lane.on_time.first() {
                let waits = self.entries.get_mut(&key)?;
                if !is_late(waits) {
                    break;
                }
                waits.is_late = true;
                *alone_ms -= waits.alone_ms;
                lane.on_time.remove(&(turn, key));
                lane.late.insert((waits.arrived, key));
            }
        }
        line.first(of)
    }

    /// It goes on to a worker.
    pub(crate) fn admit(&mut self, key: RequestKey, accounts: &mut Accounts) {
        let is_oldest = self.by_age.first().is_some_and(|(_, oldest)| *oldest == key);
        if let Some(waits) = self.remove(key) {
            let tokens = u64::from(waits.prompt_tokens);
            self.admitted_tokens = if is_oldest {
                self.admitted_tokens.saturating_sub(OLDEST_EVERY * tokens)
            } else {
                self.admitted_tokens + tokens
            };
            accounts.floor = accounts.floor.max(accounts.of(&waits.tenant));
        }
    }

    pub(crate) fn remove(&mut self, key: RequestKey) -> Option<Waits> {
        let waits = self.entries.remove(&key)?;
        self.by_age.remove(&(waits.arrived, key));
        self.alone_ms -= waits.alone_ms;
        if let Some(class) = self.classes.get_mut(&waits.priority) {
            if let Some(line) = class.lines.get_mut(&waits.tenant) {
                let lane = line.lane(waits.is_long);
                if waits.is_late {
                    lane.late.remove(&(waits.arrived, key));
                } else {
                    class.alone_ms -= waits.alone_ms;
                    lane.on_time.remove(&(waits.turn, key));
                }
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
        line.last()
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Milliseconds of prefill that wait.
    pub(crate) fn alone_ms(&self) -> f64 {
        self.alone_ms
    }

    /// Of those that are on time, and of this class or come before it.
    pub(crate) fn before_ms(&self, priority: i32) -> f64 {
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
        Waits {
            priority,
            tenant,
            arrived: Duration::ZERO,
            turn: due,
            due,
            prompt_tokens: 50,
            alone_ms: 1.0,
            is_long: false,
            is_late: false,
        }
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
            let (key, _) = self.room.next(&self.accounts, Among::All, |_| false)?;
            let waits = self.room.entries.get(&key)?.clone();
            self.room.admit(key, &mut self.accounts);
            let tenant = Tenant { name: waits.tenant.clone(), weight };
            self.accounts.charge(&tenant, tokens);
            Some((key, waits))
        }
    }

    #[test]
    fn the_earliest_deadline_of_the_first_class_is_next_and_who_is_late_comes_last() {
        let mut f = Fixture::default();
        let low = f.push(waits(5, "a", 1));
        assert_eq!([0, 5].map(|class| f.room.before_ms(class)), [0.0, 1.0]);
        let late = f.push(waits(0, "a", 2));
        let second = f.push(waits(0, "a", 9));
        let first = f.push(waits(0, "a", 8));
        let returned = f.push(Waits { is_late: true, ..waits(0, "a", 1) });
        let turns = [Turn::OnTime, Turn::OnTime, Turn::Late, Turn::Late, Turn::OnTime];
        for (expected, turn) in [first, second, late, returned, low].into_iter().zip(turns) {
            let is_late = |waits: &Waits| waits.due < 3 * SECOND && waits.priority == 0;
            assert_eq!(f.room.next(&f.accounts, Among::All, is_late), Some((expected, turn)));
            let late_ones = f64::from(
                [late, returned]
                    .map(|key| {
                        u8::from(f.room.entries.get(&key).is_some_and(|waits| waits.is_late))
                    })
                    .iter()
                    .sum::<u8>(),
            );
            assert_eq!(
                f.room.before_ms(5),
                f.room.alone_ms() - late_ones,
                "who is late is before nobody"
            );
            f.room.admit(expected, &mut f.accounts);
        }
        assert!(f.room.is_empty() && f.room.classes.is_empty() && f.room.by_age.is_empty());
    }

    #[test]
    fn who_is_not_long_passes_those_who_are() {
        let mut f = Fixture::default();
        let long = |waits| Waits { is_long: true, ..waits };
        let first = f.push(long(waits(0, "a", 1)));
        assert_eq!(f.room.next(&f.accounts, Among::NotLong, |_| false), None);
        let low = f.push(waits(1, "a", 1));
        let late = f.push(long(Waits { is_late: true, ..waits(0, "a", 1) }));
        let next = |f: &mut Fixture, of| f.room.next(&f.accounts, of, |_| false);
        assert_eq!(next(&mut f, Among::NotLong), Some((low, Turn::OnTime)), "of any class");
        let other = f.push(waits(0, "b", 9));
        f.accounts.charge(&Tenant { name: Arc::from("b"), weight: 1.0 }, 1000.0);
        assert_eq!(next(&mut f, Among::NotLong), Some((other, Turn::OnTime)), "and tenant");
        assert_eq!(next(&mut f, Among::All), Some((first, Turn::OnTime)));
        assert_eq!(f.room.gives_way(1, "c"), None);
        assert_eq!(f.room.gives_way(0, "c"), Some(low));
        f.room.remove(low);
        assert_eq!(f.room.gives_way(0, "c"), Some(late), "the last of those that are late");
        for key in [first, late, other] {
            f.room.remove(key);
        }
        assert!(f.room.is_empty() && f.room.classes.is_empty());
        assert_eq!((f.room.alone_ms(), f.room.before_ms(9)), (0.0, 0.0));
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
                let (key, _) = f.room.next(&f.accounts, Among::All, |_| false).unwrap();
                let waits = f.room.entries.get(&key).unwrap().clone();
                f.room.admit(key, &mut f.accounts);
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

        /// Whoever waits is admitted in the end, whatever comes after him, and though he is late.
        #[test]
        fn nobody_starves(
            before in prop::collection::vec((-3..3i32, 0..4u8, 1..20u32), 0..10),
            is_long: bool,
            own_tokens in 1..20u32,
            is_late: bool,
            after in prop::collection::vec((-3..3i32, 0..4u8, 100..200u32), 160),
        ) {
            let mut f = Fixture::default();
            let of = |(priority, tenant, prompt_tokens): (i32, u8, u32), arrived| Waits {
                prompt_tokens,
                arrived: arrived * SECOND,
                ..waits(priority, &tenant.to_string(), 100)
            };
            for one in &before {
                f.push(of(*one, 1));
            }
            let victim = f.push(Waits { is_late, is_long, ..of((9, 9, own_tokens), 2) });
            let older: u32 = before.iter().map(|(.., tokens)| *tokens).sum();
            // Who is served last may be longer than what was owed.
            let bound = OLDEST_EVERY * u64::from(older + own_tokens) + u64::from(older + 2 * 200);
            let mut admitted_tokens = 0;
            for one in after {
                f.push(of(one, 3));
                let (key, waits) = f.serve(1.0, 50.0).unwrap();
                if key == victim {
                    prop_assert!(admitted_tokens <= bound, "{admitted_tokens} > {bound}");
                    return Ok(());
                }
                admitted_tokens += u64::from(waits.prompt_tokens);
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
