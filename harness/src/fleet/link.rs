use super::{Nanos, nanos};

/// What it costs to bring a prompt's KV from one worker to another.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    pub latency_ms: f64,
    pub us_per_token: f64,
    /// Handoffs of one sender, and those of one receiver, take turns. Otherwise each has the link to
    /// itself.
    pub shared: bool,
}

impl Default for Link {
    /// 400 Gbit/s InfiniBand and 320 KiB of KV a token.
    fn default() -> Self {
        Self { latency_ms: 2.0, us_per_token: 8.0, shared: false }
    }
}

/// When the ends of a worker's link are free again.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LinkUse {
    pub(super) sends_until: Nanos,
    pub(super) receives_until: Nanos,
}

impl Link {
    /// When the last of so many tokens has come.
    pub(super) fn transfer(
        &self,
        now: Nanos,
        tokens: u32,
        sender: &mut LinkUse,
        receiver: &mut LinkUse,
    ) -> Nanos {
        let busy = nanos(f64::from(tokens) * self.us_per_token / 1000.0);
        let start = if self.shared {
            now.max(sender.sends_until).max(receiver.receives_until)
        } else {
            now
        };
        sender.sends_until = start + busy;
        receiver.receives_until = start + busy;
        start + busy + nanos(self.latency_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_link_is_used_in_turn() {
        let mut link = Link { latency_ms: 1.0, us_per_token: 1.0, shared: true };
        let (mut a, mut b, mut c) = (LinkUse::default(), LinkUse::default(), LinkUse::default());
        assert_eq!(link.transfer(0, 1000, &mut a, &mut b), 2_000_000);
        assert_eq!(link.transfer(0, 1000, &mut a, &mut c), 3_000_000, "one sender");
        let mut d = LinkUse::default();
        assert_eq!(link.transfer(0, 1000, &mut d, &mut b), 3_000_000, "one receiver");
        link.shared = false;
        assert_eq!(link.transfer(0, 1000, &mut a, &mut b), 2_000_000);
    }
}
