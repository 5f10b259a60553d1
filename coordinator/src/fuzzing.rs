//! What a coordinator reads of clients and workers, held against what must be true whatever comes.

use std::time::Instant;

use baton_config::SloConfig;
use baton_core::{RequestShape, Settings, WorkerKey, policy};
use baton_proto::{self as wire, worker_frame::Frame};
use bytes::Bytes;
use http::HeaderValue;

use crate::{
    client::{Endpoint, peek},
    fleet::{Link, introduce},
    prompt::{self, Prompt, PromptContent},
    shell::{ForwardedRequest, IncomingRequest, Shell},
};

const MODEL: &str = "m";
/// A worker's word about a job of a number below this is about one of the jobs that there are: of eight
/// places, each in its first, second, … use.
const SMALL_NUMBERS: u64 = 64;

/// A client's body.
pub fn client_request(bytes: &[u8]) {
    let body = Bytes::copy_from_slice(bytes);
    let whole = peek(Endpoint::Whole, &body);
    if let Ok(peeked) = peek(Endpoint::Generation, &body) {
        assert!(whole.is_ok(), "what may be split may be whole");
        let prompt = prompt::read_now(&body, &peeked.prompt, None);
        if let Some(Prompt { content: PromptContent::Tokens(tokens), .. }) = prompt {
            assert!(tokens.len() <= body.len());
        }
    }
}

/// A worker that says what it likes, beside one that says nothing. A frame that is none stands for a client's
/// request.
pub fn worker_frames(frames: Vec<wire::WorkerFrame>) {
    let Some(policy) = policy::policy("slack") else { return };
    let settings = Settings { keeps_decisions: true, ..Settings::default() };
    let shell = Shell::new(settings, (policy.make)(1), None, SloConfig::default(), 1 << 16, true);
    let mut workers: Vec<WorkerKey> = Vec::new();
    let mut requests = Vec::new();
    attach(&shell, &silent(), &mut workers);
    for frame in frames {
        let Some(frame) = frame.frame else {
            requests.push(shell.arrive(request()));
            shell.tick();
            continue;
        };
        match (frame, workers.last().copied()) {
            (Frame::Hello(hello), _) => attach(&shell, &hello, &mut workers),
            (Frame::Events(mut batch), Some(worker)) => {
                for event in batch.events.iter_mut().filter(|event| event.job < SMALL_NUMBERS) {
                    event.job = ((1 + event.job / 8) << 32) | (event.job % 8);
                }
                shell.events(worker, batch);
            }
            (Frame::Report(report), Some(worker)) => shell.report(worker, report),
            (Frame::KvEvents(events), Some(worker)) => shell.kv_events(worker, &events),
            (Frame::Leaving(_), Some(worker)) => shell.worker_leaves(worker),
            (_, None) => {}
        }
        assert!(shell.requests_open() <= requests.len());
        let _ = (shell.workers(), shell.models(), shell.is_ready(), shell.waiting_by_priority());
    }
    workers.into_iter().for_each(|worker| shell.worker_lost(worker));
    drop(requests);
    assert_eq!(shell.requests_open(), 0);
    assert_eq!(shell.lock().core.requests_open(), 0);
}

fn attach(shell: &Shell, hello: &wire::Hello, workers: &mut Vec<WorkerKey>) {
    if let Ok((description, peer)) = introduce(hello, &[]) {
        let link = Link::welcome(wire::Welcome::default());
        workers.push(shell.attach(description, link, peer, hello));
    }
}

fn silent() -> wire::Hello {
    let epoch = Bytes::from_static(&[9; 16]);
    let peer = wire::Peer {
        worker_name: "silent".to_owned(),
        epoch: epoch.clone(),
        address: "127.0.0.1:1".to_owned(),
        certificate_fingerprint: Bytes::from_static(&[9; 32]),
        compatibility: None,
    };
    let compatibility = wire::Compatibility {
        model: MODEL.to_owned(),
        block_size_tokens: 4,
        block_bytes: 64,
        tensor_parallel_size: 1,
        ..wire::Compatibility::default()
    };
    wire::Hello {
        protocol_version: wire::PROTOCOL_VERSION,
        worker_name: "silent".to_owned(),
        epoch,
        role: wire::Role::Decode.into(),
        models: vec![MODEL.to_owned()],
        max_model_tokens: 4096,
        handoff_mode: wire::HandoffMode::Fenced.into(),
        peer: Some(peer),
        compatibility: Some(compatibility),
        ..wire::Hello::default()
    }
}

fn request() -> IncomingRequest {
    let body = Bytes::from_static(br#"{"prompt":[1,2,3,4,5,6,7,8,9]}"#);
    IncomingRequest {
        shape: RequestShape { model: Some(MODEL.to_owned()), ..RequestShape::default() },
        prompt: Some(Prompt {
            content: PromptContent::Tokens((1..10).collect()),
            cache_salt: String::new(),
        }),
        streams: true,
        request_id: HeaderValue::from_static("r"),
        arrived: Instant::now(),
        trace: None,
        budget: None,
        forward: ForwardedRequest { path: "/v1/completions".to_owned(), headers: Vec::new(), body },
    }
}
