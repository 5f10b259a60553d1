//! Clients that never stop asking, and what they saw.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use baton_tests::HttpsClient;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

const CLIENTS: usize = 6;
const PROMPTS: usize = 4;
/// An answer that takes longer has been forgotten.
const FORGOTTEN: Duration = Duration::from_secs(40);

/// What became of the requests.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally {
    /// Right answers, by the worker that decoded them.
    pub(crate) answered: BTreeMap<String, usize>,
    /// Clean failures: an error in OpenAI's shape, or at the end of a stream.
    pub(crate) failed: Vec<String>,
    /// No connection, or one that ended before the answer did.
    pub(crate) unreached: usize,
    /// Wrong answers, ends in silence, requests that nobody ended.
    pub(crate) wrong: Vec<String>,
}

impl Tally {
    pub(crate) fn all_answered(&self) -> usize {
        self.answered.values().sum()
    }
}

/// Requests in flight, over one coordinator.
pub(crate) struct Load {
    tally: Arc<Mutex<Tally>>,
    clients: Vec<JoinHandle<()>>,
}

fn request(prompt: usize, streams: bool) -> Value {
    let text =
        format!("Prompt {prompt}: the baton passes from hand to hand, and never to the ground. ")
            .repeat(4);
    json!({
        "model": "baton-sim", "prompt": text, "max_tokens": 24, "temperature": 0,
        "ignore_eos": true, "stream": streams,
    })
}

impl Load {
    /// Asks once for what the right answers are, and then for ever.
    pub(crate) async fn start(client: &HttpsClient) -> Self {
        let mut right = Vec::new();
        for prompt in 0..PROMPTS {
            let (status, _, text) =
                client.post("/v1/completions", &request(prompt, false)).await.unwrap();
            assert_eq!(status, 200, "{text}");
            let json: Value = serde_json::from_str(&text).unwrap();
            right.push(json["choices"][0]["text"].as_str().unwrap().to_owned());
        }
        let right = Arc::new(right);
        let tally = Arc::new(Mutex::new(Tally::default()));
        let clients = (0..CLIENTS).map(|number| {
            let (client, right, tally) = (client.clone(), right.clone(), tally.clone());
            tokio::spawn(async move {
                for turn in number.. {
                    ask(&client, turn, &right[turn % PROMPTS], &tally).await;
                }
            })
        });
        Self { clients: clients.collect(), tally }
    }

    pub(crate) fn tally(&self) -> Tally {
        self.tally.lock().unwrap().clone()
    }

    /// Waits for so many more answers; they are to come within a minute.
    pub(crate) async fn more_answers(&self, count: usize) {
        let wanted = self.tally().all_answered() + count;
        let more = async {
            while self.tally().all_answered() < wanted {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let came = tokio::time::timeout(Duration::from_secs(60), more).await;
        assert!(came.is_ok(), "requests do not flow: {:?}", self.tally());
    }

    /// Waits for so many more answers of one decode worker.
    pub(crate) async fn more_answers_of(&self, worker: &str, count: usize) {
        let of_worker = || self.tally().answered.get(worker).copied().unwrap_or_default();
        let wanted = of_worker() + count;
        let more = async {
            while of_worker() < wanted {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let came = tokio::time::timeout(Duration::from_secs(60), more).await;
        assert!(came.is_ok(), "{worker} answers nothing: {:?}", self.tally());
    }

    pub(crate) fn stop(self) -> Tally {
        for client in &self.clients {
            client.abort();
        }
        let tally = self.tally();
        assert!(tally.wrong.is_empty(), "{tally:#?}");
        println!(
            "{:?} answered, {} clean failures, {} unreached",
            tally.answered,
            tally.failed.len(),
            tally.unreached
        );
        tally
    }
}

async fn ask(client: &HttpsClient, turn: usize, right: &str, tally: &Mutex<Tally>) {
    let streams = turn.is_multiple_of(2);
    let body = request(turn % PROMPTS, streams);
    let asked = client.post("/v1/completions", &body);
    let Ok(answered) = tokio::time::timeout(FORGOTTEN, asked).await else {
        tally.lock().unwrap().wrong.push(format!("request {turn} was forgotten"));
        return;
    };
    let Ok((status, headers, text)) = answered else {
        tally.lock().unwrap().unreached += 1;
        // Not a storm of connections while the coordinator is away.
        return tokio::time::sleep(Duration::from_millis(100)).await;
    };
    let mut tally = tally.lock().unwrap();
    let error_code = |json: &Value| json["error"]["code"].as_str().map(str::to_owned);
    if status != 200 {
        let json = serde_json::from_str(&text).unwrap_or_default();
        match error_code(&json) {
            Some(code) => tally.failed.push(code),
            None => tally.wrong.push(format!("{status}: {text}")),
        }
        return;
    }
    let generated = if streams {
        let events = text.split("\n\n").filter_map(|event| event.strip_prefix("data: "));
        let (mut generated, mut last) = (String::new(), "");
        for event in events {
            let json: Value = serde_json::from_str(event).unwrap_or_default();
            if let Some(code) = error_code(&json) {
                return tally.failed.push(code);
            }
            generated += json["choices"][0]["text"].as_str().unwrap_or_default();
            last = event;
        }
        if last != "[DONE]" {
            return tally.wrong.push(format!("a stream ended in silence: {text}"));
        }
        generated
    } else {
        let json: Value = serde_json::from_str(&text).unwrap_or_default();
        json["choices"][0]["text"].as_str().unwrap_or_default().to_owned()
    };
    if generated == right {
        let of = |name: &str| headers.get(name)?.to_str().ok().map(str::to_owned);
        let worker = of("x-baton-decode-worker").or_else(|| of("x-baton-worker"));
        *tally.answered.entry(worker.unwrap_or_default()).or_default() += 1;
    } else {
        tally.wrong.push(format!("request {turn}: {generated:?}, not {right:?}"));
    }
}
