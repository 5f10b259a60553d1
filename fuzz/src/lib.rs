//! Every place of this project that reads bytes of a peer: what a client, an engine, another worker or a
//! coordinator sends. Each of them takes any bytes, and checks what must be true whatever they are.
//!
//! The tests feed them `corpus/NAME/`; `libfuzzer/` looks for more (`scripts/fuzz.sh`). Python's are in
//! `connector/fuzz/`.

use baton_proto::{StartJob, WorkerFrame};
use prost::Message;

/// One of them.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    pub name: &'static str,
    /// Panics where something is not true that must be.
    pub run: fn(&[u8]),
}

/// All of them, by who reads.
pub const TARGETS: &[Target] = &[
    // Between workers.
    Target { name: "subscription", run: baton_transfer::fuzzing::subscription },
    Target { name: "producer_frame", run: baton_transfer::fuzzing::producer_frame },
    Target { name: "pulled_handoff", run: baton_transfer::fuzzing::pulled_handoff },
    Target { name: "shm_hello", run: baton_transfer::fuzzing::shm_hello },
    Target { name: "ucx_words", run: baton_transfer::fuzzing::ucx_words },
    Target { name: "ucx_frames", run: baton_transfer::fuzzing::ucx_frames },
    // A worker, of its engine.
    Target { name: "worker_socket", run: baton_engine::fuzzing::worker_socket },
    Target { name: "kv_events", run: baton_engine::fuzzing::kv_events },
    Target { name: "engine_exchange", run: baton_engine::fuzzing::engine_exchange },
    Target { name: "answer_body", run: baton_engine::fuzzing::answer_body },
    Target { name: "engine_description", run: baton_engine::fuzzing::engine_description },
    Target { name: "engine_answer", run: baton_worker::fuzzing::engine_answer },
    // A worker, of its coordinator and through it of clients.
    Target { name: "started_job", run: started_job },
    Target { name: "rewritten_request", run: baton_worker::fuzzing::rewritten_request },
    // A coordinator.
    Target { name: "client_request", run: baton_coordinator::fuzzing::client_request },
    Target { name: "worker_frames", run: worker_frames },
];

/// The one of this name.
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

fn started_job(bytes: &[u8]) {
    if let Ok(start) = StartJob::decode(bytes) {
        baton_worker::fuzzing::started_job(start);
    }
}

/// One frame after the other, each with its length before it as protobuf's streams have it.
fn worker_frames(mut bytes: &[u8]) {
    let mut frames = Vec::new();
    while !bytes.is_empty() {
        let Ok(frame) = WorkerFrame::decode_length_delimited(&mut bytes) else { break };
        frames.push(frame);
    }
    baton_coordinator::fuzzing::worker_frames(frames);
}
