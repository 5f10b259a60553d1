//! Against blocks that are filled byte by byte from what each byte means, without any run.

use proptest::prelude::*;

use super::*;

const TOKENS: u32 = 4;

/// One model, cut up in two ways.
#[derive(Clone, Debug)]
struct Model {
    heads: u32,
    cell_bytes: u32,
    has_kv_axis: bool,
    layers: Vec<u32>,
}

fn described(model: &Model, ranks: u32, order: &[char]) -> Compatibility {
    let on_rank = (model.heads / ranks).max(1);
    let axes: String = (order.iter())
        .filter(|axis| model.has_kv_axis || **axis != 'k')
        .map(|axis| match axis {
            'k' => "k2.".to_owned(),
            't' => format!("t{TOKENS}."),
            _ => format!("h{on_rank}."),
        })
        .collect();
    let pages: Vec<_> = (model.layers.iter())
        .map(|layers| format!("{layers}*{axes}{}", model.cell_bytes))
        .collect();
    let kv_heads = format!("F/{}/{}", model.heads, pages.join("+"));
    let block_bytes = kv_heads.parse::<HeadLayout>().unwrap().block_bytes().unwrap();
    Compatibility {
        model: "m".into(),
        revision: String::new(),
        kv_dtype: "bfloat16".into(),
        kv_layout: format!("{order:?} on {ranks}"),
        block_size_tokens: TOKENS,
        block_bytes,
        layer_groups: 1,
        tensor_parallel_rank: 0,
        tensor_parallel_size: ranks,
        connector_version: "1".into(),
        kv_heads,
    }
}

/// The block of one rank, each byte telling of what it is.
fn filled(model: &Model, ranks: u32, order: &[char], rank: u32) -> Vec<u64> {
    let on_rank = (model.heads / ranks).max(1);
    let first_head =
        if ranks > model.heads { rank / (ranks / model.heads) } else { rank * on_rank };
    let kvs = if model.has_kv_axis { 2 } else { 1 };
    let size = |axis| match axis {
        'k' => kvs,
        't' => TOKENS,
        _ => on_rank,
    };
    let mut bytes = Vec::new();
    for layer in 0..model.layers.iter().sum::<u32>() {
        for outer in 0..size(order[0]) {
            for middle in 0..size(order[1]) {
                for inner in 0..size(order[2]) {
                    let at = |axis| {
                        let position = order.iter().position(|other| *other == axis).unwrap();
                        u64::from([outer, middle, inner][position])
                    };
                    for byte in 0..model.cell_bytes {
                        let head = u64::from(first_head) + at('h');
                        let meaning = [u64::from(layer), at('k'), at('t'), head, u64::from(byte)];
                        bytes.push(meaning.iter().fold(0, |all, part| all * 100 + part));
                    }
                }
            }
        }
    }
    bytes
}

fn orders() -> impl Strategy<Value = Vec<char>> {
    Just(vec!['k', 't', 'h']).prop_shuffle()
}

/// Ranks that so many heads can be split over.
fn ranks_for(heads: u32) -> impl Strategy<Value = u32> {
    let possible: Vec<_> = (1..=4 * heads)
        .filter(|ranks| heads.is_multiple_of(*ranks) || ranks.is_multiple_of(heads))
        .collect();
    prop::sample::select(possible)
}

fn cases() -> impl Strategy<Value = (Model, u32, u32, Vec<char>, Vec<char>)> {
    let heads = prop::sample::select(vec![1_u32, 2, 3, 4, 6, 8]);
    let model = (heads, 1_u32..5, any::<bool>(), prop::collection::vec(1_u32..3, 1..3));
    model.prop_flat_map(|(heads, cell_bytes, has_kv_axis, layers)| {
        let model = Model { heads, cell_bytes, has_kv_axis, layers };
        (Just(model), ranks_for(heads), ranks_for(heads), orders(), orders())
    })
}

proptest! {
    #[test]
    fn every_byte_comes_once_to_where_it_belongs((model, from_ranks, to_ranks, from, to) in cases()) {
        let reslice = Reslice::between(
            &described(&model, from_ranks, &from),
            &described(&model, to_ranks, &to),
        ).unwrap();
        prop_assert_eq!(reslice.sources(), from_ranks);
        let expected: Vec<_> =
            (0..to_ranks).map(|rank| filled(&model, to_ranks, &to, rank)).collect();
        let mut made: Vec<Vec<Option<u64>>> =
            expected.iter().map(|block| vec![None; block.len()]).collect();
        for rank in 0..from_ranks {
            let block = filled(&model, from_ranks, &from, rank);
            for cover in reslice.covers(rank) {
                // Run by run, from the first byte to the last: read back, it is the block again.
                let mut read = 0;
                for run in cover {
                    prop_assert_eq!(run.from, read);
                    read += run.bytes;
                    for byte in 0..run.bytes {
                        let place = &mut made[run.to_rank as usize][run.to + byte];
                        prop_assert_eq!(place.replace(block[run.from + byte]), None, "written twice");
                    }
                }
                prop_assert_eq!(read, block.len());
            }
        }
        for (made, expected) in made.iter().zip(expected) {
            let made: Option<Vec<_>> = made.iter().copied().collect();
            prop_assert_eq!(made, Some(expected), "something is missing or elsewhere");
        }
    }
}

#[test]
fn heads_that_lie_together_go_together() {
    let model = Model { heads: 8, cell_bytes: 64, has_kv_axis: true, layers: vec![2] };
    let (four, two) =
        (described(&model, 4, &['k', 'h', 't']), described(&model, 2, &['k', 'h', 't']));
    let reslice = Reslice::between(&four, &two).unwrap();
    // Two layers, keys and values: four runs of two heads of four tokens each.
    let half = 2 * 4 * 64;
    let to = |run: usize| run * 2 * half + half;
    let runs: Vec<_> =
        (0..4).map(|run| Run { from: run * half, to_rank: 1, to: to(run), bytes: half }).collect();
    assert_eq!(reslice.covers(3), [runs]);
    assert_eq!(Reslice::between(&four, &four).unwrap().covers(2)[0].len(), 1, "a plain copy");
}

#[test]
fn of_ranks_that_hold_the_same_one_gives_and_all_receive() {
    let model = Model { heads: 2, cell_bytes: 4, has_kv_axis: false, layers: vec![1] };
    let order = ['t', 'h', 'k'];
    let (eight, one) = (described(&model, 8, &order), described(&model, 1, &order));
    let gathered = Reslice::between(&eight, &one).unwrap();
    let gives: Vec<_> = (0..8).map(|rank| gathered.covers(rank).len()).collect();
    assert_eq!(gives, [1, 0, 0, 0, 1, 0, 0, 0]);
    assert_eq!(Reslice::between(&one, &eight).unwrap().covers(0).len(), 4);
    assert_eq!(gathered.covers(8), &[] as &[Vec<Run>]);
}

#[test]
fn what_cannot_be_is_refused_with_what_both_say() {
    let model = Model { heads: 8, cell_bytes: 4, has_kv_axis: true, layers: vec![2] };
    let order = ['k', 't', 'h'];
    let (ours, theirs) = (described(&model, 2, &order), described(&model, 4, &order));
    type Spoil = fn(&mut Compatibility);
    let spoilt: [(Spoil, &str); 5] = [
        (|c| c.kv_heads.clear(), "kv_heads differs: F/8/2*k2.t4.h4.4 here, unknown at the peer"),
        (|c| c.model.push('x'), "model differs: m here, mx at the peer"),
        (|c| c.tensor_parallel_size = 3, "kv_heads differs"),
        (|c| c.tensor_parallel_size = 0, "kv_heads differs"),
        (|c| c.block_bytes += 1, "kv_heads differs"),
    ];
    for (spoil, told) in spoilt {
        let mut spoilt = theirs.clone();
        spoil(&mut spoilt);
        let error = Reslice::between(&spoilt, &ours).unwrap_err().to_string();
        assert!(error.contains(told), "{error}");
    }
    // Alike, and both impossible.
    let mut three = theirs.clone();
    three.tensor_parallel_size = 3;
    let error = Reslice::between(&three, &three).unwrap_err().to_string();
    assert!(error.contains("2 of 8 KV heads on each of 3 ranks"), "{error}");
    let fine = |bytes| Compatibility {
        kv_heads: "F/1/1*t2097152.h1.1".into(),
        tensor_parallel_size: 1,
        block_bytes: bytes,
        ..theirs.clone()
    };
    let error = Reslice::between(&fine(1 << 21), &fine(1 << 21)).unwrap_err().to_string();
    assert!(error.contains("more than 1048576 pieces"), "{error}");
    let error = Reslice::between(&fine(7), &fine(7)).unwrap_err().to_string();
    assert!(error.contains("not the 7 bytes"), "{error}");
}
