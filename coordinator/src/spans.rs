//! One trace of each request over both its legs, sent by OTLP. Off unless the file has
//! `telemetry.otlp_endpoint`.
//!
//! ```text
//! POST /v1/chat/completions
//! ├ queue              from its arrival until its first leg was given to a worker
//! ├ placement          what the choice of its workers took
//! ├ prefill            the prefill leg; its engine's spans stand below it
//! │ └ prefix pull      where the start of the prompt was copied from another worker first
//! └ decode leg         the leg that answers; its engine's spans stand below it
//!   ├ handoff          from decode's subscription to its last verified block
//!   └ decode           from the first token to the last
//! ```
//!
//! One worker alone has an `aggregated leg` with `prefill` and `decode` in it. The spans are made when a
//! request ends, of its turning points; what its engines must know before is drawn when it arrives.

use std::{
    borrow::Cow,
    time::{Duration, Instant, SystemTime},
};

use baton_config::TelemetryConfig;
use baton_proto as wire;
use baton_types::{Fault, Leg};
use bytes::Bytes;
use http::{HeaderMap, HeaderName};
use opentelemetry::{
    InstrumentationScope, KeyValue, SpanId, TraceFlags, TraceId,
    propagation::{Extractor, TextMapPropagator as _},
    trace::{Event, SpanContext, SpanKind, Status, TraceContextExt as _, TraceState},
};
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig as _};
use opentelemetry_sdk::{
    Resource,
    propagation::TraceContextPropagator,
    trace::{
        BatchSpanProcessor, IdGenerator as _, RandomIdGenerator, SpanData, SpanEvents, SpanLinks,
        SpanProcessor as _,
    },
};

use crate::{admin::EndedRequest, timeline::Timeline};

const TRACEPARENT: &str = "traceparent";
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);
/// Of one request's failed legs, more are not told.
const MOST_FAULTS: usize = 8;

/// Where spans go.
#[derive(Debug)]
pub(crate) struct Tracer {
    processor: BatchSpanProcessor,
    ids: RandomIdGenerator,
    sample_ratio: f64,
}

/// One request's names in its trace.
#[derive(Debug)]
pub(crate) struct RequestTrace {
    trace: TraceId,
    state: TraceState,
    /// The client's own span.
    parent: Option<SpanId>,
    request: SpanId,
    prefill_leg: SpanId,
    answering_leg: SpanId,
    path: String,
    faults: Vec<(Instant, Leg, Fault)>,
    handoff: Option<wire::HandoffResult>,
    /// When it was told, and what became of it.
    pull: Option<(Instant, wire::PullResult, &'static str)>,
}

/// How a request ended.
#[derive(Debug)]
pub(crate) struct Ending<'a> {
    pub(crate) request: &'a EndedRequest,
    pub(crate) model: &'a str,
    /// Why it was not split.
    pub(crate) reason: &'static str,
    pub(crate) is_error: bool,
    pub(crate) status_code: u16,
    pub(crate) at: Instant,
}

impl Tracer {
    /// `None` where nothing is to be sent. To be called on the runtime that shall carry the spans.
    pub(crate) fn open(config: &TelemetryConfig) -> Result<Option<Self>, ExporterBuildError> {
        let Some(endpoint) = &config.otlp_endpoint else { return Ok(None) };
        let exporter = SpanExporter::builder()
            .with_tonic()
            .with_endpoint(endpoint)
            .with_timeout(EXPORT_TIMEOUT)
            .build()?;
        let mut processor = BatchSpanProcessor::builder(exporter).build();
        let resource = Resource::builder()
            .with_service_name("baton-coordinator")
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .build();
        processor.set_resource(&resource);
        let ids = RandomIdGenerator::default();
        Ok(Some(Self { processor, ids, sample_ratio: config.sample_ratio }))
    }

    /// `None` for a request that is not traced. The client's own decision goes before ours.
    pub(crate) fn begin(&self, headers: &HeaderMap, path: &str) -> Option<RequestTrace> {
        let context = TraceContextPropagator::new().extract(&Headers(headers));
        let remote = context.span().span_context().clone();
        let parent = remote.is_valid().then_some(remote);
        let is_sampled = match &parent {
            Some(parent) => parent.is_sampled(),
            None => self.draw(),
        };
        if !is_sampled {
            return None;
        }
        let trace = parent.as_ref().map_or_else(|| self.ids.new_trace_id(), SpanContext::trace_id);
        Some(RequestTrace {
            trace,
            state: parent.as_ref().map(|p| p.trace_state().clone()).unwrap_or_default(),
            parent: parent.as_ref().map(SpanContext::span_id),
            request: self.ids.new_span_id(),
            prefill_leg: self.ids.new_span_id(),
            answering_leg: self.ids.new_span_id(),
            path: path.split('?').next().unwrap_or_default().to_owned(),
            faults: Vec::new(),
            handoff: None,
            pull: None,
        })
    }

    /// True for the configured share of requests.
    fn draw(&self) -> bool {
        let drawn = u64::from_be_bytes(self.ids.new_span_id().to_bytes());
        #[allow(clippy::cast_precision_loss, reason = "a share needs no more")]
        let share = drawn as f64 / u64::MAX as f64;
        self.sample_ratio >= 1.0 || share < self.sample_ratio
    }

    pub(crate) fn end(&self, trace: &RequestTrace, timeline: &Timeline, ending: &Ending<'_>) {
        let spans = Spans { tracer: self, trace, now: (Instant::now(), SystemTime::now()) };
        spans.send(timeline, ending);
    }

    /// Sends what has gathered. Blocks.
    pub(crate) fn close(&self) {
        if let Err(error) = self.processor.shutdown_with_timeout(EXPORT_TIMEOUT) {
            tracing::warn!(%error, "the last spans were not sent");
        }
    }
}

struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).and_then(|value| value.to_str().ok())
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(HeaderName::as_str).collect()
    }
}

impl RequestTrace {
    /// Puts a leg's span in the place of the client's: its engine's spans go below it.
    pub(crate) fn passed_on(&self, leg: Leg, headers: &mut Vec<wire::Header>) {
        let span = match leg {
            Leg::Prefill | Leg::Lend => self.prefill_leg,
            Leg::Decode | Leg::Aggregated => self.answering_leg,
        };
        headers.retain(|header| !header.name.eq_ignore_ascii_case(TRACEPARENT));
        // W3C Trace Context, section 3.2: version, trace, parent, and the flag "sampled".
        let value = Bytes::from(format!("00-{}-{span}-01", self.trace));
        headers.push(wire::Header { name: TRACEPARENT.to_owned(), value });
    }

    pub(crate) fn leg_failed(&mut self, leg: Leg, fault: &Fault) {
        if self.faults.len() < MOST_FAULTS {
            self.faults.push((Instant::now(), leg, fault.clone()));
        }
    }

    pub(crate) fn handed_over(&mut self, moved: &wire::HandoffResult) {
        self.handoff = Some(moved.clone());
    }

    pub(crate) fn pulled(&mut self, result: &wire::PullResult, outcome: &'static str) {
        self.pull = Some((Instant::now(), result.clone(), outcome));
    }
}

/// Makes one request's spans.
struct Spans<'a> {
    tracer: &'a Tracer,
    trace: &'a RequestTrace,
    now: (Instant, SystemTime),
}

impl Spans<'_> {
    fn send(&self, timeline: &Timeline, ending: &Ending<'_>) {
        let trace = self.trace;
        self.span(Span {
            id: trace.request,
            parent: trace.parent.unwrap_or(SpanId::INVALID),
            kind: SpanKind::Server,
            name: format!("POST {}", trace.path).into(),
            from: timeline.arrived,
            to: ending.at,
            attributes: request_attributes(trace, timeline, ending),
            events: self.faults(),
            status: if ending.is_error {
                Status::error(ending.request.outcome.clone())
            } else {
                Status::Unset
            },
        });
        let placed = timeline.placed.unwrap_or(ending.at);
        self.inner("queue", trace.request, timeline.arrived, placed, Vec::new());
        if let Some((from, to)) = timeline.placing {
            self.inner("placement", trace.request, from, to, Vec::new());
        }
        if timeline.placed.is_none() {
            return;
        }
        let answered = timeline.answered.unwrap_or(ending.at);
        let leg = |name, id, worker: &str, to| Span {
            id,
            parent: trace.request,
            kind: SpanKind::Client,
            name: Cow::Borrowed(name),
            from: placed,
            to,
            attributes: vec![KeyValue::new("baton.worker", worker.to_owned())],
            events: Vec::new(),
            status: Status::Unset,
        };
        let request = ending.request;
        if let Some((at, pull, outcome)) = &trace.pull {
            let id = if request.prefill_worker.is_empty() {
                trace.answering_leg
            } else {
                trace.prefill_leg
            };
            self.pull(id, pull, outcome, *at, placed);
        }
        if request.prefill_worker.is_empty() {
            let id = trace.answering_leg;
            self.span(leg("aggregated leg", id, &request.decode_worker, ending.at));
            self.inner("prefill", id, placed, answered, Vec::new());
        } else {
            let prefilled = timeline.prefilled.unwrap_or(answered);
            self.span(leg("prefill", trace.prefill_leg, &request.prefill_worker, prefilled));
            let id = trace.answering_leg;
            self.span(leg("decode leg", id, &request.decode_worker, ending.at));
            if let Some(moved) = &trace.handoff {
                self.handoff(moved, placed, answered);
            }
        }
        if timeline.answered.is_some() {
            self.inner("decode", trace.answering_leg, answered, ending.at, Vec::new());
        }
    }

    /// The leg waited for it, and told when it was over.
    fn pull(
        &self,
        leg: SpanId,
        pull: &wire::PullResult,
        outcome: &'static str,
        at: Instant,
        placed: Instant,
    ) {
        let from = at.checked_sub(Duration::from_micros(pull.micros));
        let from = from.map_or(placed, |from| from.max(placed));
        let attributes = vec![
            KeyValue::new("baton.pull.result", outcome),
            KeyValue::new("baton.pull.tokens", i64::from(pull.tokens)),
        ];
        self.inner("prefix pull", leg, from, at, attributes);
    }

    /// The worker says how long it took, and that it was over when the answer began: so this is late by
    /// what the first token took.
    fn handoff(&self, moved: &wire::HandoffResult, placed: Instant, answered: Instant) {
        let took = Duration::from_micros(moved.micros);
        let from = answered.checked_sub(took).map_or(placed, |from| from.max(placed));
        let count = |name: &'static str, count: u64| {
            KeyValue::new(name, i64::try_from(count).unwrap_or(i64::MAX))
        };
        let attributes = vec![
            count("baton.handoff.bytes", moved.bytes),
            count("baton.handoff.blocks", moved.blocks.into()),
            count("baton.handoff.blocks_mapped", moved.blocks_mapped.into()),
            count("baton.handoff.blocks_reused", moved.blocks_reused.into()),
            KeyValue::new("baton.handoff.transport", moved.transport.clone()),
        ];
        self.inner("handoff", self.trace.answering_leg, from, answered, attributes);
    }

    fn faults(&self) -> Vec<Event> {
        let faults = self.trace.faults.iter();
        let event = |(at, leg, fault): &(Instant, Leg, Fault)| {
            let attributes = vec![
                KeyValue::new("baton.leg", leg.as_str()),
                KeyValue::new("baton.fault.origin", fault.origin.as_str()),
                KeyValue::new("baton.fault.kind", fault.kind.as_str()),
            ];
            Event::new("leg failed", self.clock(*at), attributes, 0)
        };
        faults.map(event).collect()
    }

    fn inner(
        &self,
        name: &'static str,
        parent: SpanId,
        from: Instant,
        to: Instant,
        attributes: Vec<KeyValue>,
    ) {
        self.span(Span {
            id: self.tracer.ids.new_span_id(),
            parent,
            kind: SpanKind::Internal,
            name: Cow::Borrowed(name),
            from,
            to,
            attributes,
            events: Vec::new(),
            status: Status::Unset,
        });
    }

    fn span(&self, span: Span) {
        let trace = self.trace;
        let is_outermost = span.id == trace.request;
        let mut events = SpanEvents::default();
        events.events = span.events;
        self.tracer.processor.on_end(SpanData {
            span_context: SpanContext::new(
                trace.trace,
                span.id,
                TraceFlags::SAMPLED,
                false,
                trace.state.clone(),
            ),
            parent_span_id: span.parent,
            parent_span_is_remote: is_outermost && trace.parent.is_some(),
            span_kind: span.kind,
            name: span.name,
            start_time: self.clock(span.from),
            end_time: self.clock(span.to.max(span.from)),
            attributes: span.attributes,
            dropped_attributes_count: 0,
            events,
            links: SpanLinks::default(),
            status: span.status,
            instrumentation_scope: InstrumentationScope::builder("baton").build(),
        });
    }

    fn clock(&self, at: Instant) -> SystemTime {
        let (instant, time) = self.now;
        time.checked_sub(instant.saturating_duration_since(at)).unwrap_or(time)
    }
}

struct Span {
    id: SpanId,
    parent: SpanId,
    kind: SpanKind,
    name: Cow<'static, str>,
    from: Instant,
    to: Instant,
    attributes: Vec<KeyValue>,
    events: Vec<Event>,
    status: Status,
}

/// By OpenTelemetry's names where there are some.
fn request_attributes(
    trace: &RequestTrace,
    timeline: &Timeline,
    ending: &Ending<'_>,
) -> Vec<KeyValue> {
    let texts = [
        ("http.request.method", "POST"),
        ("url.path", trace.path.as_str()),
        ("gen_ai.request.model", ending.model),
        ("baton.request_id", ending.request.id.as_str()),
        ("baton.path", ending.request.path.as_str()),
        ("baton.reason", ending.reason),
        ("baton.outcome", ending.request.outcome.as_str()),
    ];
    let texts = texts.into_iter().filter(|(_, text)| !text.is_empty());
    let mut attributes: Vec<KeyValue> =
        texts.map(|(name, text)| KeyValue::new(name, text.to_owned())).collect();
    attributes.push(KeyValue::new("baton.attempts", i64::from(timeline.attempts)));
    if ending.status_code != 0 {
        let status = i64::from(ending.status_code);
        attributes.push(KeyValue::new("http.response.status_code", status));
    }
    attributes
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[derive(Debug)]
    struct Nowhere;

    impl opentelemetry_sdk::trace::SpanExporter for Nowhere {
        async fn export(&self, _: Vec<SpanData>) -> opentelemetry_sdk::error::OTelSdkResult {
            Ok(())
        }
    }

    fn tracer(sample_ratio: f64) -> Tracer {
        let processor = BatchSpanProcessor::builder(Nowhere).build();
        Tracer { processor, ids: RandomIdGenerator::default(), sample_ratio }
    }

    fn headers(traceparent: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(TRACEPARENT, HeaderValue::from_str(traceparent).unwrap());
        headers
    }

    #[test]
    fn each_leg_passes_its_own_span_on_in_the_clients_trace() {
        let came = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let trace = tracer(0.0).begin(&headers(came), "/v1/completions?x=1").unwrap();
        assert_eq!(trace.path, "/v1/completions");
        let passed_on = |leg| {
            let header = |name: &str, value: &str| wire::Header {
                name: name.to_owned(),
                value: Bytes::copy_from_slice(value.as_bytes()),
            };
            let mut headers = vec![header("Traceparent", came), header("tracestate", "a=b")];
            trace.passed_on(leg, &mut headers);
            assert_eq!(headers[0], header("tracestate", "a=b"), "it goes on as it came");
            assert_eq!(headers.len(), 2, "one parent");
            assert_eq!(headers[1].name, TRACEPARENT);
            String::from_utf8(headers[1].value.to_vec()).unwrap()
        };
        let (prefill, decode) = (passed_on(Leg::Prefill), passed_on(Leg::Decode));
        assert_ne!(prefill, decode);
        for value in [&prefill, &decode] {
            assert_eq!(
                (value.len(), &value[..36], &value[52..]),
                (55, &came[..36], "-01"),
                "{value}"
            );
            assert_ne!(value, came);
        }
    }

    #[test]
    fn the_client_decides_and_else_the_ratio() {
        let not_sampled = headers("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00");
        assert!(tracer(1.0).begin(&not_sampled, "/").is_none());
        assert!(tracer(1.0).begin(&HeaderMap::new(), "/").is_some());
        assert!(tracer(0.0).begin(&HeaderMap::new(), "/").is_none());
        let half = tracer(0.5);
        let traced = (0..400).filter(|_| half.begin(&HeaderMap::new(), "/").is_some()).count();
        assert!((100..300).contains(&traced), "{traced} of 400");
    }
}
