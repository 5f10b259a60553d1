use std::{path::Path, time::Duration};

use super::Trace;

fn parse(text: &str) -> Result<Trace, String> {
    Trace::parse(text, Path::new("some/trace.x")).map_err(|errors| errors.to_string())
}

fn arrivals_ms(trace: &Trace) -> Vec<f64> {
    trace.requests.iter().map(|request| request.arrival.as_secs_f64() * 1000.0).collect()
}

const AZURE: &str = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n\
    2023-11-16 23:59:59.9799600,4808,10\r\n2023-11-17 00:00:00.0319600,3180,8\r\n";

#[test]
fn mooncake_stamps_are_spread_and_its_hashes_are_prefixes() {
    let text = r#"{"timestamp":6000,"input_length":600,"output_length":5,"hash_ids":[1,2]}
{"timestamp":6000,"input_length":512,"output_length":5,"hash_ids":[1]}
{"timestamp":9000,"input_length":1,"output_length":1,"hash_ids":[]}"#;
    let trace = parse(text).unwrap();
    assert_eq!(trace.name, "trace");
    assert_eq!(arrivals_ms(&trace), [0.0, 1500.0, 3000.0]);
    assert_eq!(*trace.requests[0].prefix_blocks, [1, 2]);
    assert_eq!(trace.prefix_block_tokens, 512);
    assert!(!trace.is_composite());
}

#[test]
fn our_stamps_are_what_they_say() {
    let text = r#"{"timestamp":10,"input_length":3,"output_length":5,"phase":"code","client":4}

{"timestamp":10,"input_length":3,"output_length":5,"phase":"chat"}
{"timestamp":9000.25,"input_length":3,"output_length":5,"phase":"code","hash_ids":[4]}"#;
    let trace = parse(text).unwrap();
    assert_eq!(arrivals_ms(&trace), [0.0, 0.0, 8990.25]);
    assert_eq!(trace.phases, ["code", "chat"]);
    assert_eq!(trace.requests.iter().map(|r| r.phase.unwrap()).collect::<Vec<_>>(), [0, 1, 0]);
}

#[test]
fn azure_has_dates() {
    let trace = parse(AZURE).unwrap();
    assert_eq!(trace.requests[1].arrival, Duration::from_micros(52_000));
    assert_eq!((trace.requests[1].input_tokens, trace.requests[1].output_tokens), (3180, 8));
    let of_2024 = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00+00:00,1,2\n\
                   2024-05-10 00:00:00.009930+00:00,3,4\n";
    assert_eq!(parse(of_2024).unwrap().requests[1].arrival, Duration::from_nanos(9_930_000));
}

#[test]
fn burst_gpt_has_seconds() {
    let header = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n";
    let whole = "5,ChatGPT,472,18,490,Conversation log\n5,GPT-4,1,230,231,API log\n\
                 6,ChatGPT,1,1,2,API log\n";
    let trace = parse(&format!("{header}{whole}")).unwrap();
    assert_eq!(arrivals_ms(&trace), [0.0, 500.0, 1000.0]);
    assert_eq!((trace.requests[0].input_tokens, trace.requests[0].output_tokens), (472, 18));
    let finer = whole.replace("6,", "6.5,");
    assert_eq!(arrivals_ms(&parse(&format!("{header}{finer}")).unwrap()), [0.0, 0.0, 1500.0]);
}

#[test]
fn every_error_is_told_at_once() {
    let text = r#"{"timestamp":5,"input_length":3,"output_length":5}
{"timestamp":4,"input_length":0,"output_length":5}
{"timestamp":6,"input_length":3,"output_length":0}
{"timestamp":6,"input_length":3,"output_length":-1}
{"timestamp":6,"input_length":3,"output_length":1,"prioriy":1}
{"timestamp":-6,"input_length":3,"output_length":1}
{"timestamp":7,"input_length":512,"output_length":1,"hash_ids":[1,2]}
{"timestamp":8,"input_length":3,"#;
    let said = parse(text).unwrap_err();
    let said: Vec<_> = said.lines().collect();
    for (line, expected) in [
        (2, "input_length is 0: expected at least 1"),
        (2, "timestamp lies before that of line 1: expected the order of arrival"),
        (3, "output_length is 0: expected at least 1"),
        (4, "invalid value: integer `-1`, expected u32 at column 50"),
        (5, "unknown field `prioriy`, expected one of"),
        (6, "timestamp is -6: expected milliseconds from 0 up"),
        (7, "2 hash_ids for 512 of input_length: expected at most 1, one for each 512 tokens"),
        (8, "EOF while parsing"),
    ] {
        let expected = format!("some/trace.x:{line}: {expected}");
        assert!(
            said.iter().any(|said| said.starts_with(&expected)),
            "no {expected:?} in {said:#?}"
        );
    }
    assert_eq!(said.len(), 8);
    assert!(said.is_sorted(), "{said:#?}");
}

#[test]
fn csv_errors_have_their_lines() {
    let text = format!(
        "{AZURE}2023-11-17,1,2\n2023-11-17 00:00:00.04,1\n\
                        \n2023-11-17 00:00:00.02,0,x\n2023-11-16 00:00:00.01,1,1\n"
    );
    assert_eq!(
        parse(&text).unwrap_err().lines().collect::<Vec<_>>(),
        [
            "some/trace.x:4: TIMESTAMP is \"2023-11-17\": expected a time like 2023-11-16 18:17:03.9799600",
            "some/trace.x:5: has 2 fields: expected 3, as the header",
            "some/trace.x:7: GeneratedTokens is \"x\": expected a number of tokens",
            "some/trace.x:8: TIMESTAMP lies before that of line 3: expected the order of arrival",
        ]
    );
}

#[test]
fn what_is_no_trace_is_refused() {
    let said = parse("num_prefill_tokens,num_decode_tokens\n1,2\n").unwrap_err();
    assert!(said.starts_with("some/trace.x:1: a trace of no known format starts with"), "{said}");
    let said = parse("TIMESTAMP,ContextTokens,GeneratedTokens,Tenant\n").unwrap_err();
    assert_eq!(said, "some/trace.x:1: the column \"Tenant\" is unknown");
    for empty in ["", "\n \n", "TIMESTAMP,ContextTokens,GeneratedTokens\n"] {
        assert_eq!(parse(empty).unwrap_err(), "some/trace.x: holds no request");
    }
    let said = Trace::read(Path::new("no/such/file")).unwrap_err().to_string();
    assert!(said.starts_with("no/such/file: cannot be read: "), "{said}");
}

#[test]
fn a_file_of_errors_is_not_repeated_whole() {
    let said = parse(&"{}\n".repeat(25)).unwrap_err();
    assert_eq!(said.lines().count(), 21);
    assert!(said.ends_with("some/trace.x: and 5 more errors"), "{said}");
}

#[test]
fn what_is_written_is_read_back() {
    let text = r#"{"timestamp":0,"input_length":600,"output_length":5,"hash_ids":[1,2]}
{"timestamp":0,"input_length":512,"output_length":5,"hash_ids":[1]}
{"timestamp":0,"input_length":512,"output_length":5,"hash_ids":[18446744073709551615]}
{"timestamp":3001,"input_length":1,"output_length":1,"hash_ids":[9]}"#;
    let trace = parse(text).unwrap();
    let mut written = Vec::new();
    trace.write_jsonl(&mut written).unwrap();
    let again = parse(std::str::from_utf8(&written).unwrap()).unwrap();
    assert_eq!(again.requests.len(), trace.requests.len());
    for (again, once) in again.requests.iter().zip(&trace.requests) {
        assert!(again.arrival.abs_diff(once.arrival) < Duration::from_micros(1));
        assert_eq!(again.prefix_blocks, once.prefix_blocks);
    }
}

#[test]
fn poisson_arrivals_keep_the_rate() {
    let trace = Trace::poisson(50.0, 10_000, 7, 8, 1);
    assert_eq!(trace, Trace::poisson(50.0, 10_000, 7, 8, 1));
    assert!((trace.rate_rps() - 50.0).abs() < 2.0, "{}", trace.rate_rps());
    assert!(trace.requests.is_sorted_by_key(|request| request.arrival));
    assert_eq!(Trace::poisson(0.0, 9, 7, 8, 1).requests.len(), 1);
}
