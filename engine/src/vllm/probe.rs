//! What vLLM says of itself.

use std::time::Duration;

use http::StatusCode;
use serde::{Deserialize, de::DeserializeOwned};

use super::http::EngineHttp;
use crate::{EngineDescription, EngineError, EngineLoad};

const HEALTH_POLL: Duration = Duration::from_millis(200);

pub(super) async fn health(engine: &EngineHttp) -> Result<(), EngineError> {
    let (status, _) = engine.ask("/health").await?;
    if status.is_success() { Ok(()) } else { Err(unexpected("/health", status)) }
}

pub(super) async fn until_healthy(engine: &EngineHttp) {
    while health(engine).await.is_err() {
        tokio::time::sleep(HEALTH_POLL).await;
    }
}

#[derive(Deserialize)]
struct Models {
    data: Vec<Model>,
}

#[derive(Deserialize)]
struct Model {
    id: String,
    /// The base model, of an adapter.
    #[serde(default)]
    parent: Option<String>,
    /// Absent for an adapter in older versions.
    max_model_len: Option<u32>,
}

#[derive(Deserialize)]
struct Version {
    version: String,
}

pub(super) async fn describe(engine: &EngineHttp) -> Result<EngineDescription, EngineError> {
    let models: Models = read(engine, "/v1/models").await?;
    let version: Version = read(engine, "/version").await?;
    let max_model_tokens = models.data.iter().filter_map(|model| model.max_model_len).max();
    let adapters = models.data.iter().filter(|model| model.parent.is_some());
    let missing =
        |reason: &str| EngineError::Unexpected { what: "/v1/models", reason: reason.to_owned() };
    Ok(EngineDescription {
        engine: format!("vllm {}", version.version),
        max_model_tokens: max_model_tokens.ok_or_else(|| missing("no max_model_len"))?,
        adapters: adapters.map(|model| model.id.clone()).collect(),
        models: models.data.iter().map(|model| model.id.clone()).collect(),
    })
}

pub(super) async fn load(engine: &EngineHttp) -> Result<EngineLoad, EngineError> {
    let (status, metrics) = engine.ask("/metrics").await?;
    if !status.is_success() {
        return Err(unexpected("/metrics", status));
    }
    Ok(parse_load(&String::from_utf8_lossy(&metrics)))
}

/// A KV cache: tokens of one block, and of all where vLLM says how many there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CacheConfig {
    pub(super) block_size_tokens: u32,
    pub(super) capacity_tokens: Option<u64>,
}

pub(super) async fn cache_config(engine: &EngineHttp) -> Result<CacheConfig, EngineError> {
    let (status, metrics) = engine.ask("/metrics").await?;
    if !status.is_success() {
        return Err(unexpected("/metrics", status));
    }
    parse_cache_config(&String::from_utf8_lossy(&metrics)).ok_or(EngineError::Unexpected {
        what: "/metrics",
        reason: "no block_size in vllm:cache_config_info".to_owned(),
    })
}

fn parse_cache_config(metrics: &str) -> Option<CacheConfig> {
    let info = metrics.lines().find(|line| line.starts_with("vllm:cache_config_info{"))?;
    let label = |name: &str| {
        let [first, later] = ["{", ","].map(|before| format!("{before}{name}=\""));
        let (_, rest) = info.split_once(&first).or(info.split_once(&later))?;
        rest.split('"').next()?.parse::<u32>().ok()
    };
    let block_size_tokens = label("block_size")?;
    let capacity = |blocks| u64::from(blocks) * u64::from(block_size_tokens);
    let capacity_tokens = label("num_gpu_blocks").filter(|blocks| *blocks > 0).map(capacity);
    Some(CacheConfig { block_size_tokens, capacity_tokens })
}

/// With several engines behind one server (data parallel), requests add up and the fullest cache
/// counts.
fn parse_load(metrics: &str) -> EngineLoad {
    let mut load = EngineLoad::default();
    for line in metrics.lines() {
        let Some((series, value)) = line.rsplit_once(' ') else { continue };
        let Ok(value) = value.parse::<f32>() else { continue };
        let name = series.split('{').next().unwrap_or_default();
        match name {
            "vllm:num_requests_running" => add(&mut load.requests_running, value),
            "vllm:num_requests_waiting" => add(&mut load.requests_waiting, value),
            "vllm:kv_cache_usage_perc" => load.kv_used_ratio = load.kv_used_ratio.max(value),
            _ => {}
        }
    }
    load
}

/// Adds a gauge that counts things.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // `as` saturates, NaN is 0.
fn add(to: &mut u32, gauge: f32) {
    *to = to.saturating_add(gauge as u32);
}

async fn read<T: DeserializeOwned>(
    engine: &EngineHttp,
    path: &'static str,
) -> Result<T, EngineError> {
    let (status, body) = engine.ask(path).await?;
    if !status.is_success() {
        return Err(unexpected(path, status));
    }
    serde_json::from_slice(&body)
        .map_err(|e| EngineError::Unexpected { what: path, reason: e.to_string() })
}

fn unexpected(what: &'static str, status: StatusCode) -> EngineError {
    EngineError::Unexpected { what, reason: format!("HTTP {status}") }
}

#[cfg(feature = "fuzzing")]
pub(super) fn fuzz(bytes: &[u8]) {
    let _ = serde_json::from_slice::<Models>(bytes);
    let _ = serde_json::from_slice::<Version>(bytes);
    let text = String::from_utf8_lossy(bytes);
    let load = parse_load(&text);
    assert!(load.kv_used_ratio >= 0.0);
    if let Some(cache) = parse_cache_config(&text) {
        assert!(cache.capacity_tokens.is_none_or(|all| all >= cache.block_size_tokens.into()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_caches_size_is_read_from_vllms_metrics() {
        let metrics = "# TYPE vllm:cache_config_info gauge\n\
            vllm:cache_config_info{_block_size_resolved=\"True\",block_size=\"128\",\
            cache_dtype=\"auto\",hash_block_size=\"None\",num_gpu_blocks=\"100\",\
            num_gpu_blocks_override=\"None\"} 1.0\n";
        let expected = CacheConfig { block_size_tokens: 128, capacity_tokens: Some(12_800) };
        assert_eq!(parse_cache_config(metrics), Some(expected));
        let unknown = "vllm:cache_config_info{block_size=\"16\",num_gpu_blocks=\"None\"} 1.0";
        let expected = CacheConfig { block_size_tokens: 16, capacity_tokens: None };
        assert_eq!(parse_cache_config(unknown), Some(expected));
        assert_eq!(parse_cache_config("vllm:cache_config_info{} 1.0"), None);
    }

    #[test]
    fn the_load_is_read_from_vllms_metrics() {
        let metrics = "# HELP vllm:num_requests_running Number of requests in model execution\n\
            # TYPE vllm:num_requests_running gauge\n\
            vllm:num_requests_running{engine=\"0\",model_name=\"m m\"} 3.0\n\
            vllm:num_requests_running{engine=\"1\",model_name=\"m m\"} 2.0\n\
            vllm:num_requests_waiting{engine=\"0\",model_name=\"m m\"} 7.0\n\
            vllm:num_requests_waiting_by_reason{engine=\"0\",reason=\"capacity\"} 7.0\n\
            vllm:kv_cache_usage_perc{engine=\"0\",model_name=\"m m\"} 0.25\n\
            vllm:kv_cache_usage_perc{engine=\"1\",model_name=\"m m\"} 0.5\n";
        let load = parse_load(metrics);
        assert_eq!(
            load,
            EngineLoad { requests_running: 5, requests_waiting: 7, kv_used_ratio: 0.5 }
        );
        let most = "vllm:num_requests_running 1e30\nvllm:num_requests_running 1.0\n";
        assert_eq!(parse_load(most).requests_running, u32::MAX);
    }
}
