//! The traces that ship are traces.

#![allow(clippy::panic, clippy::unwrap_used)]

use std::path::Path;

use baton_harness::trace::Trace;

fn sample(file: &str) -> Trace {
    let samples = Path::new(env!("CARGO_MANIFEST_DIR")).join("samples");
    Trace::read(&samples.join(file)).unwrap_or_else(|errors| panic!("{errors}"))
}

#[test]
fn services_of_azure() {
    let (code, conv) = (sample("azure_code.csv"), sample("azure_conv.csv"));
    assert_eq!((code.requests.len(), conv.requests.len()), (2000, 2000));
    assert_eq!((code.requests[0].input_tokens, code.requests[0].output_tokens), (4808, 10));
    let mean_output = |trace: &Trace| {
        let outputs: u64 = trace.requests.iter().map(|r| u64::from(r.output_tokens)).sum();
        outputs as f64 / trace.requests.len() as f64
    };
    // Code completions are short, chat answers are not.
    assert!(mean_output(&code) * 4.0 < mean_output(&conv));
}

#[test]
fn phases_that_take_turns() {
    let trace = sample("azure_code_conv_phases.jsonl");
    assert_eq!(trace.phases, ["code", "conv"]);
    assert!((175.0..180.0).contains(&trace.duration().as_secs_f64()));
    let turns = trace.requests.chunk_by(|a, b| a.phase == b.phase).count();
    assert_eq!(turns, 4);
}

#[test]
fn prefixes_of_mooncake() {
    let trace = sample("mooncake_conversation.jsonl");
    assert_eq!(trace.requests.len(), 1000);
    assert!(trace.requests.iter().all(|request| !request.prefix_blocks.is_empty()));
    // Its three-second stamps are spread.
    let distinct = trace.requests.chunk_by(|a, b| a.arrival == b.arrival).count();
    assert_eq!(distinct, 1000);
}
