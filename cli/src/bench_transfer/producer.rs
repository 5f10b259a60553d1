//! The producing half: a process of its own, told what to export over its stdin.

use std::{io::BufRead as _, path::Path, sync::Arc, time::Duration};

use anyhow::Context as _;
use baton_transfer::Ledger;
use baton_types::HandoffId;
use tokio::sync::mpsc;

use super::{
    Answer, BenchOptions, COMPATIBILITY, GENERATION, Order, PROMPT, PROMPT_TOKENS, cpu_seconds,
    epoch_of, scattered,
};
use crate::terminal::Terminal;

/// Longer than any round.
const LEASE: Duration = Duration::from_secs(600);

pub(super) async fn run(options: &BenchOptions, sockets: &Path) -> anyhow::Result<()> {
    // In the other half's, which takes it away: this half is killed.
    let directory = tempfile::tempdir_in(sockets)?;
    let arena = options.arena(directory.path())?;
    let mut filling = fastrand::Rng::with_seed(7);
    let mut block = vec![0; usize::try_from(options.slot_bytes())?];
    let slots = scattered(options.slots()?);
    for slot in &slots {
        filling.fill(&mut block);
        arena.write(*slot, 0, &block)?;
    }
    let number = u128::from(fastrand::u64(1..));
    let ledger = Ledger::new(epoch_of(number), COMPATIBILITY, LEASE);
    let (channel, address) = options.open("producer", sockets, Arc::new(ledger.clone()))?;
    channel.use_arena(&arena);
    say(&Answer::Here {
        address: address.address,
        fingerprint: address.certificate_fingerprint,
        epoch: number,
    })?;
    let mut orders = orders();
    let mut consumer = [0; 32];
    while let Some(order) = orders.recv().await {
        match serde_json::from_str(&order?).context("no order of the other half")? {
            Order::For { fingerprint } => consumer = fingerprint,
            Order::Export { ids, blocks, block_bytes } => {
                let mut slots = slots.iter().cycle();
                for id in ids {
                    let id = HandoffId::from_u128(id);
                    // Whoever pulls it knows how it ended.
                    drop(ledger.expect(id, GENERATION, consumer)?);
                    for (index, slot) in (0..blocks).zip(&mut slots) {
                        let view = arena.view(*slot, u64::from(block_bytes))?;
                        ledger.push(id, GENERATION, index, view.into_bytes())?;
                    }
                    ledger.seal(id, GENERATION, PROMPT_TOKENS, PROMPT, 0)?;
                }
            }
        }
        say(&Answer::Done { cpu_seconds: cpu_seconds()?, transports: channel.transports() })?;
    }
    Ok(())
}

/// Lines of stdin, until the other half ends.
fn orders() -> mpsc::Receiver<std::io::Result<String>> {
    let (sender, orders) = mpsc::channel(1);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            if sender.blocking_send(line).is_err() {
                return;
            }
        }
    });
    orders
}

fn say(answer: &Answer) -> anyhow::Result<()> {
    Terminal::stdout().say(&serde_json::to_string(answer)?);
    Ok(())
}
