//! What a worker reads of its coordinator and of its engine, held against what must be true whatever comes.

use baton_proto::StartJob;
use baton_types::{Compatibility, HeadLayout, Leg, Reslice};
use bytes::Bytes;

use crate::{answer_text, jobs, legs, relay};

/// A client's body, as both legs rewrite it for their engines.
pub fn rewritten_request(bytes: &[u8]) {
    legs::fuzz(&Bytes::copy_from_slice(bytes));
}

/// What an engine answers, whole or as events.
pub fn engine_answer(bytes: &[u8]) {
    answer_text::fuzz(bytes);
    if let Ok(parameters) = relay::engine_parameters(bytes) {
        assert!(serde_json::from_slice::<serde::de::IgnoredAny>(&parameters).is_ok());
    }
}

/// A job of the coordinator's, as far as it is read before anything is done for it.
pub fn started_job(start: StartJob) {
    let _ = (jobs::request_id(&start), Leg::try_from(start.leg()));
    if let Ok((_, peer)) = jobs::named(start.handoff.as_ref()) {
        let epoch = baton_proto::epoch("Peer", &peer.epoch);
        assert_eq!(epoch.is_ok(), peer.epoch.len() == 16);
        let fingerprint = baton_proto::fingerprint("Peer", &peer.certificate_fingerprint);
        assert_eq!(fingerprint.is_ok(), peer.certificate_fingerprint.len() == 32);
        if let Some(theirs) = peer.compatibility.clone().map(Compatibility::from) {
            resliced(&theirs);
        }
    }
    if let Ok(parameters) = jobs::json_object(&start.engine_handoff_params) {
        assert_eq!(parameters, start.engine_handoff_params);
    }
    legs::fuzz(&start.body);
    let headers = start.headers.len();
    assert!(jobs::header_map(start.headers).len() <= headers);
}

/// Blocks that another worker says that it has, cut up for an engine of four ranks with two heads on each:
/// all of each rank's own is written once.
fn resliced(theirs: &Compatibility) {
    let ours = Compatibility {
        kv_heads: "F/8/2*t4.h2.8".to_owned(),
        block_bytes: 128,
        tensor_parallel_rank: 0,
        tensor_parallel_size: 4,
        ..theirs.clone()
    };
    if let Ok(layout) = theirs.kv_heads.parse::<HeadLayout>() {
        assert_eq!(layout.to_string().parse(), Ok(layout));
    }
    let _ = (theirs.check(&ours), theirs.pairing_digest());
    let Ok(reslice) = Reslice::between(theirs, &ours) else { return };
    let mut written = vec![[false; 128]; 4];
    for source in 0..reslice.sources() {
        for cover in reslice.covers(source) {
            let mut from = 0;
            for run in cover {
                assert_eq!(run.from, from);
                from += run.bytes;
                for byte in &mut written[run.to_rank as usize][run.to..run.to + run.bytes] {
                    assert!(!std::mem::replace(byte, true), "it is written twice");
                }
            }
            assert_eq!(from as u64, theirs.block_bytes);
        }
    }
    assert!(written.as_flattened().iter().all(|byte| *byte), "all of it is written");
}
