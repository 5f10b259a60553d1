//! Bytes written by one UCX worker lie in another's registered arena, over whatever transport the real
//! library picks.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)] // These are tests.

use baton_arena::{Arena, ArenaLayout, Slot, SlotPool};
use baton_ucx::{Lane, Options, Put, StartError, Ucx, UcxError};
use bytes::Bytes;

const SLOT_BYTES: u64 = 1 << 20;

/// UCX, or nothing where there is none and none is demanded.
fn ucx() -> Option<Ucx> {
    match Ucx::start(&Options::default()) {
        Ok(ucx) => Some(ucx),
        Err(StartError::Load(error)) => {
            let demanded = std::env::var_os("BATON_REQUIRE_UCX").is_some_and(|value| value != "0");
            assert!(!demanded, "BATON_REQUIRE_UCX is set, and {error}");
            eprintln!("SKIPPED, not run: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn arena(directory: &tempfile::TempDir, name: &str) -> Arena {
    let layout = ArenaLayout { slot_bytes: SLOT_BYTES, export_slots: 4, import_slots: 4 };
    Arena::create(&directory.path().join(name), layout).unwrap()
}

fn pattern(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 31 + seed * 7 + at / 255).to_le_bytes()[0]).collect()
}

#[tokio::test]
async fn what_is_put_lies_there_when_it_is_said_to() {
    let (Some(here), Some(there)) = (ucx(), ucx()) else { return };
    let directory = tempfile::tempdir().unwrap();
    let (from, to) = (arena(&directory, "from"), arena(&directory, "to"));
    let region = there.register(to.clone()).await.unwrap();
    let _local = here.register(from.clone()).await.unwrap();
    let endpoint = here.connect(there.address()).await.unwrap();
    let remote = endpoint.import(region.base(), region.len_bytes(), region.key()).await.unwrap();

    let pool = SlotPool::new((0..8).map(Slot));
    for (seed, len) in [1_usize, 7, 4096, 65_536, 1 << 20].into_iter().enumerate() {
        let slot = pool.reserve().await.unwrap().slot();
        let bytes = pattern(seed, len);
        from.write(slot, 0, &bytes).unwrap();
        let target = Slot(u32::try_from(seed).unwrap());
        let offset = u64::from(target.0) * SLOT_BYTES;
        let registered = Put { bytes: from.view(slot, len as u64).unwrap().into_bytes(), offset };
        remote.put(vec![registered]).unwrap().done().await.unwrap();
        assert!(to.view(target, len as u64).unwrap().as_ref() == bytes, "{len} bytes");
        // From memory that is not registered, two at once.
        let (front, back) = bytes.split_at(len / 2);
        let halves = vec![
            Put { bytes: Bytes::copy_from_slice(back), offset },
            Put { bytes: Bytes::copy_from_slice(front), offset: offset + back.len() as u64 },
        ];
        remote.put(halves).unwrap().done().await.unwrap();
        assert!(to.view(target, len as u64).unwrap().as_ref() == [back, front].concat());
    }

    let lanes = endpoint.lanes().await.unwrap();
    assert!(lanes.iter().any(|lane| lane.writes), "{lanes:?}");
    for lane in lanes {
        assert!(here.resources().contains(&lane.resource), "{lane:?} of {:?}", here.resources());
    }
}

#[tokio::test]
async fn nothing_is_written_outside_a_region() {
    let (Some(here), Some(there)) = (ucx(), ucx()) else { return };
    let directory = tempfile::tempdir().unwrap();
    let region = there.register(arena(&directory, "to")).await.unwrap();
    let endpoint = here.connect(there.address()).await.unwrap();
    let remote = endpoint.import(region.base(), region.len_bytes(), region.key()).await.unwrap();
    let fits = Put { bytes: Bytes::from_static(b"kv"), offset: region.len_bytes() - 2 };
    remote.put(vec![fits]).unwrap().done().await.unwrap();
    for offset in [region.len_bytes(), region.len_bytes() - 1, u64::MAX] {
        let put = Put { bytes: Bytes::from_static(b"kv"), offset };
        let error = remote.put(vec![put]).unwrap_err();
        assert!(matches!(error, UcxError::OutOfRegion { .. }), "{error}");
    }
}

#[tokio::test]
async fn a_peer_that_went_is_an_error_and_gives_the_bytes_back() {
    let (Some(here), Some(there)) = (ucx(), ucx()) else { return };
    let directory = tempfile::tempdir().unwrap();
    // Stays mapped: over tcp a late write lands wherever it says.
    let to = arena(&directory, "to");
    let region = there.register(to.clone()).await.unwrap();
    let endpoint = here.connect(there.address()).await.unwrap();
    let remote = endpoint.import(region.base(), region.len_bytes(), region.key()).await.unwrap();
    let bytes = Bytes::from(vec![7; 1 << 20]);
    let put = || vec![Put { bytes: bytes.clone(), offset: 0 }];
    remote.put(put()).unwrap().done().await.unwrap();
    drop((region, there));
    // What is under way while it goes may still succeed.
    let mut failed = false;
    for _ in 0..100 {
        failed = remote.put(put()).unwrap().done().await.is_err();
        if failed {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    // What is shared on one host is written to by this process itself, whoever else is there.
    let lanes = endpoint.lanes().await.unwrap_or_default();
    let is_shared =
        |lane: &Lane| ["cma", "posix", "sysv", "self"].contains(&&*lane.resource.transport);
    let by_itself = lanes.iter().filter(|lane| lane.writes).any(is_shared);
    assert!(failed || by_itself, "nobody is there, and every write succeeds: {lanes:?}");
    assert!(bytes.is_unique(), "UCX holds bytes that it is done with");
    drop(to);
}

/// A process that ends right behind this would leave a file of all its KV otherwise.
#[tokio::test]
async fn the_last_handle_leaves_no_arena_behind() {
    let (Some(here), Some(there)) = (ucx(), ucx()) else { return };
    let directory = tempfile::tempdir().unwrap();
    let to = arena(&directory, "to");
    let region = there.register(to.clone()).await.unwrap();
    let endpoint = here.connect(there.address()).await.unwrap();
    let remote = endpoint.import(region.base(), region.len_bytes(), region.key()).await.unwrap();
    let from = arena(&directory, "from");
    let local = here.register(from.clone()).await.unwrap();
    let bytes = from.view(Slot(0), SLOT_BYTES).unwrap().into_bytes();
    drop(from);
    // The first is done, the second may be under way.
    for wait in [true, false] {
        let put = Put { bytes: bytes.clone(), offset: 0 };
        let mut writing = remote.put(vec![put]).unwrap();
        if wait {
            writing.done().await.unwrap();
        }
    }
    drop((bytes, remote, endpoint, local, here));
    assert!(!directory.path().join("from").exists(), "the writer's arena is left");
    drop((to, region, there));
    assert!(!directory.path().join("to").exists(), "the arena that was written into is left");
}
