//! One trace of a request over both its legs, as a collector receives it.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use axum::{body::Body, extract::State, response::Response as HttpResponse};
use baton_config::{ArenaConfig, SimConfig};
use baton_engine::{Engine as _, EngineRequest, SimEngine};
use baton_tests::{Cluster, ClusterBuilder, read_events};
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::any_value::Value as Any,
    trace::v1::{Span, span::SpanKind, status::StatusCode},
};
use serde_json::json;
use tokio::net::TcpListener;
use tonic::{Request, Response, Status, transport::server::TcpIncoming};

/// A collector that keeps what it is sent.
#[derive(Clone, Default)]
struct Collector {
    received: Arc<Mutex<Vec<ExportTraceServiceRequest>>>,
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.received.lock().unwrap().push(request.into_inner());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    async fn start() -> (Self, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let collector = Self::default();
        let server = tonic::transport::Server::builder()
            .add_service(TraceServiceServer::new(collector.clone()))
            .serve_with_incoming(TcpIncoming::from(listener));
        tokio::spawn(server);
        (collector, address)
    }

    fn spans(&self) -> Vec<Span> {
        let received = self.received.lock().unwrap();
        let resources = received.iter().flat_map(|request| &request.resource_spans);
        let scopes = resources.flat_map(|resource| &resource.scope_spans);
        scopes.flat_map(|scope| scope.spans.clone()).collect()
    }

    fn service_names(&self) -> Vec<String> {
        let received = self.received.lock().unwrap();
        let resources = received.iter().flat_map(|request| &request.resource_spans);
        let attributes = resources.filter_map(|resource| resource.resource.as_ref());
        attributes
            .flat_map(|resource| &resource.attributes)
            .filter(|attribute| attribute.key == "service.name")
            .filter_map(|attribute| text(attribute.value.as_ref()?.value.as_ref()?))
            .collect()
    }

    /// All spans of the trace, once one of `name` has come.
    async fn trace_with(&self, id: &[u8; 16], name: &str) -> Vec<Span> {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let spans = self.spans();
            let of_trace: Vec<_> = spans.into_iter().filter(|span| span.trace_id == id).collect();
            if of_trace.iter().any(|span| span.name == name) {
                return of_trace;
            }
            assert!(Instant::now() < deadline, "no {name} came: {of_trace:#?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

fn text(value: &Any) -> Option<String> {
    match value {
        Any::StringValue(text) => Some(text.clone()),
        Any::IntValue(number) => Some(number.to_string()),
        _ => None,
    }
}

fn attribute(span: &Span, name: &str) -> String {
    let found = span.attributes.iter().find(|attribute| attribute.key == name);
    let value = found.and_then(|found| found.value.as_ref()?.value.as_ref());
    value.and_then(text).unwrap_or_default()
}

fn named<'a>(spans: &'a [Span], name: &str) -> &'a Span {
    let mut found = spans.iter().filter(|span| span.name == name);
    let span = found.next().unwrap_or_else(|| panic!("no {name}: {spans:#?}"));
    assert!(found.next().is_none(), "{name} twice: {spans:#?}");
    span
}

/// Each span's name and its parent's, sorted.
fn tree(spans: &[Span]) -> Vec<(String, String)> {
    let name_of = |id: &[u8]| {
        spans.iter().find(|span| span.span_id == id).map_or("-", |span| span.name.as_str())
    };
    let edge = |span: &Span| (name_of(&span.parent_span_id).to_owned(), span.name.clone());
    let mut tree: Vec<_> = spans.iter().map(edge).collect();
    tree.sort();
    tree
}

fn edges(expected: &[(&str, &str)]) -> Vec<(String, String)> {
    let mut edges: Vec<_> =
        expected.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
    edges.sort();
    edges
}

async fn start(endpoint: SocketAddr, more: &str) -> Cluster {
    let telemetry = format!("[telemetry]\notlp_endpoint = \"http://{endpoint}\"\n{more}");
    ClusterBuilder::sim().engine("time_scale = 0.2").tables(&telemetry).start().await.unwrap()
}

async fn ask(cluster: &Cluster, traceparent: Option<&str>, max_tokens: u32) {
    let body = json!({"prompt": "Pass it on. ".repeat(60), "max_tokens": max_tokens,
        "stream": true, "ignore_eos": true});
    let mut request = cluster.http.post(cluster.url("/v1/completions")).json(&body);
    request = request.header("x-request-id", "traced");
    if let Some(traceparent) = traceparent {
        request = request.header("traceparent", traceparent);
    }
    read_events(request.send().await.unwrap()).await.unwrap();
}

const REQUEST: &str = "POST /v1/completions";

// The collector answers while the test waits for the coordinator to end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_is_one_trace_over_both_legs() {
    let (collector, endpoint) = Collector::start().await;
    let mut cluster = start(endpoint, "").await;
    let trace: [u8; 16] = [0xab; 16];
    ask(&cluster, Some(&format!("00-{}-00f067aa0ba902b7-01", "ab".repeat(16))), 20).await;
    let spans = collector.trace_with(&trace, REQUEST).await;

    assert_eq!(
        tree(&spans),
        edges(&[
            ("-", REQUEST),
            (REQUEST, "queue"),
            (REQUEST, "placement"),
            (REQUEST, "prefill"),
            (REQUEST, "decode leg"),
            ("decode leg", "handoff"),
            ("decode leg", "decode"),
        ])
    );
    let request = named(&spans, REQUEST);
    assert_eq!(request.parent_span_id, [0x00, 0xf0, 0x67, 0xaa, 0x0b, 0xa9, 0x02, 0xb7]);
    assert_eq!(request.kind, SpanKind::Server as i32);
    for (name, value) in [
        ("baton.request_id", "traced"),
        ("baton.path", "disaggregated"),
        ("baton.outcome", "ok"),
        ("baton.attempts", "1"),
        ("http.response.status_code", "200"),
        ("url.path", "/v1/completions"),
    ] {
        assert_eq!(attribute(request, name), value, "{name}");
    }
    assert_eq!(attribute(named(&spans, "prefill"), "baton.worker"), "prefill-0");
    assert_eq!(attribute(named(&spans, "decode leg"), "baton.worker"), "decode-0");
    let handoff = named(&spans, "handoff");
    assert_eq!(attribute(handoff, "baton.handoff.transport"), "shm");
    let moved = cluster.metrics().await.sum("baton_handoff_bytes_total", &[]);
    assert_eq!(attribute(handoff, "baton.handoff.bytes").parse::<f64>().unwrap(), moved);

    // Nobody is outside of its parent, and one phase follows the other.
    for span in &spans {
        assert!(span.start_time_unix_nano <= span.end_time_unix_nano, "{span:#?}");
        let parent = spans.iter().find(|parent| parent.span_id == span.parent_span_id);
        if let Some(parent) = parent {
            // The clock is read once for all: what differs is rounding.
            let slack = 1000;
            assert!(span.start_time_unix_nano + slack >= parent.start_time_unix_nano, "{span:#?}");
            assert!(span.end_time_unix_nano <= parent.end_time_unix_nano + slack, "{span:#?}");
        }
    }
    let (queue, prefill) = (named(&spans, "queue"), named(&spans, "prefill"));
    assert!(queue.end_time_unix_nano <= prefill.start_time_unix_nano + 1000);
    let decode = named(&spans, "decode");
    assert!(handoff.end_time_unix_nano <= decode.start_time_unix_nano + 1000);
    assert!(decode.end_time_unix_nano > decode.start_time_unix_nano);
    assert!(collector.service_names().iter().all(|name| name == "baton-coordinator"));

    // What one worker does alone has no handoff.
    ask(&cluster, Some(&format!("00-{}-00f067aa0ba902b7-01", "cd".repeat(16))), 1).await;
    let spans = collector.trace_with(&[0xcd; 16], REQUEST).await;
    assert_eq!(
        tree(&spans),
        edges(&[
            ("-", REQUEST),
            (REQUEST, "queue"),
            (REQUEST, "placement"),
            (REQUEST, "aggregated leg"),
            ("aggregated leg", "prefill"),
            ("aggregated leg", "decode"),
        ])
    );
    assert_eq!(attribute(named(&spans, REQUEST), "baton.reason"), "one_token");

    // A leg that fails is an event, and a request that breaks off an error; the last spans are sent when
    // the coordinator stops.
    let body = json!({"prompt": "To the end. ".repeat(60), "max_tokens": 8000, "stream": true});
    let parent = format!("00-{}-00f067aa0ba902b7-01", "ef".repeat(16));
    let broken = cluster.http.post(cluster.url("/v1/completions")).header("traceparent", parent);
    let broken = broken.json(&body).send().await.unwrap();
    cluster.kill("decode-0");
    let _ = broken.text().await;
    cluster.terminate("coordinator").unwrap();
    let spans = collector.trace_with(&[0xef; 16], REQUEST).await;
    let request = named(&spans, REQUEST);
    assert_eq!(request.status.as_ref().unwrap().code, StatusCode::Error as i32);
    assert_eq!(attribute(request, "baton.outcome"), "broken_off");
    assert!(request.events.iter().any(|event| event.name == "leg failed"), "{request:#?}");
}

// The collector answers while the test waits for the coordinator to end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_decides_for_its_requests_and_the_ratio_for_the_others() {
    let (collector, endpoint) = Collector::start().await;
    let mut cluster = start(endpoint, "sample_ratio = 0\n").await;
    ask(&cluster, None, 3).await;
    ask(&cluster, Some(&format!("00-{}-00f067aa0ba902b7-00", "ab".repeat(16))), 3).await;
    ask(&cluster, Some("not a traceparent"), 3).await;
    ask(&cluster, Some(&format!("00-{}-00f067aa0ba902b7-01", "cd".repeat(16))), 3).await;
    cluster.terminate("coordinator").unwrap();
    collector.trace_with(&[0xcd; 16], REQUEST).await;
    let spans = collector.spans();
    assert!(spans.iter().all(|span| span.trace_id == [0xcd; 16]), "{spans:#?}");
}

/// The embedded engine behind HTTP, as vLLM is, which notes the context that generating requests bring.
#[derive(Clone)]
struct HttpEngine {
    engine: Arc<SimEngine>,
    contexts: Arc<Mutex<Vec<String>>>,
}

impl HttpEngine {
    async fn start(directory: &std::path::Path) -> (Self, SocketAddr) {
        let config = SimConfig { time_scale: 0.0, ..SimConfig::default() };
        let arena = ArenaConfig { directory: directory.to_owned(), ..ArenaConfig::default() };
        let engine = Arc::new(SimEngine::start(&config, &arena, "behind-http").unwrap());
        let this = Self { engine, contexts: Arc::default() };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = axum::Router::new().fallback(Self::answer).with_state(this.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        (this, address)
    }

    async fn answer(State(this): State<Self>, request: axum::extract::Request) -> HttpResponse {
        let (parts, body) = request.into_parts();
        if parts.method == http::Method::POST {
            let context = parts.headers.get("traceparent").map(|value| value.to_str().unwrap());
            this.contexts.lock().unwrap().push(context.unwrap_or_default().to_owned());
        }
        let request = EngineRequest {
            method: parts.method,
            path: parts.uri.path().to_owned(),
            headers: parts.headers,
            body: axum::body::to_bytes(body, usize::MAX).await.unwrap(),
        };
        let answer = this.engine.run(request).await.unwrap();
        let mut response = HttpResponse::new(Body::from_stream(answer.body));
        *response.status_mut() = answer.status;
        *response.headers_mut() = answer.headers;
        response
    }
}

#[tokio::test]
async fn an_engine_is_told_its_legs_span_in_the_clients_trace() {
    let (collector, endpoint) = Collector::start().await;
    let directory = tempfile::tempdir().unwrap();
    let (engine, address) = HttpEngine::start(directory.path()).await;
    let telemetry = format!("[telemetry]\notlp_endpoint = \"http://{endpoint}\"\n");
    let builder = ClusterBuilder::sim().pools(0, 0).tables(&telemetry).not_ready();
    let mut cluster = builder.start().await.unwrap();
    let toml = format!(
        "{}\n[[worker]]\nname = \"v\"\nrole = \"decode\"\n[worker.engine]\nkind = \"vllm\"\nurl = \
         \"http://{address}\"\n",
        cluster.config().unwrap()
    );
    cluster.start_worker_of(&toml, "v", "decode", "v").unwrap();
    cluster.wait_for_workers(1, Duration::from_secs(30)).await.unwrap();

    ask(&cluster, Some(&format!("00-{}-00f067aa0ba902b7-01", "ab".repeat(16))), 4).await;
    let spans = collector.trace_with(&[0xab; 16], REQUEST).await;
    let leg = &named(&spans, "aggregated leg").span_id;
    let leg: String = leg.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(*engine.contexts.lock().unwrap(), [format!("00-{}-{leg}-01", "ab".repeat(16))]);

    // Of a request that is not traced it learns what the client said.
    let own = format!("00-{}-00f067aa0ba902b7-00", "cd".repeat(16));
    ask(&cluster, Some(&own), 4).await;
    assert_eq!(engine.contexts.lock().unwrap()[1], own);
}
