//! Who sends a request: tenants, known by their API keys. What they may have beside each other is
//! decided elsewhere; here they only get a name, and no more requests in flight and tokens a minute than
//! they may.

use std::{
    fs, io,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use axum::{
    body::Body,
    extract::{Request, State},
    middleware::Next,
    response::Response,
};
use baton_config::{Followed, Refreshed, TenantConfig};
use bytes::Bytes;
use http::{HeaderMap, header};
use http_body::{Frame, SizeHint};
use sha2::{Digest as _, Sha256};
use subtle::{Choice, ConstantTimeEq as _};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::{info, warn};

use super::{
    error::ClientError, forward::REQUEST_ID, token_budget::TokenBudget, unread::refuse_unread,
};
use crate::{CoordinatorError, metrics::Metrics};

/// The tenant of a request, as an extension of it.
#[derive(Clone, Debug)]
pub(crate) struct Tenant {
    pub(crate) name: Arc<str>,
    /// Its share beside others while requests wait.
    pub(crate) weight: f64,
    /// Of its requests that give none.
    pub(crate) priority: i32,
    pub(crate) budget: Option<Arc<TokenBudget>>,
}

/// Keys are kept and compared as their SHA-256 alone.
type KeyDigest = [u8; 32];

/// All who may send requests.
#[derive(Debug)]
pub(crate) struct Tenants {
    tenants: Vec<Known>,
}

#[derive(Debug)]
struct Known {
    tenant: Tenant,
    digest: Option<KeyDigest>,
    file: Option<Followed<Vec<KeyDigest>, KeyFileError>>,
    in_flight: Option<InFlightLimit>,
}

#[derive(Debug)]
struct InFlightLimit {
    limit: u32,
    free: Arc<Semaphore>,
}

/// Why a file of keys cannot be used. Says nothing of what is in it.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    #[error("cannot read {path}: {source}", path = path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{path} holds no key: give one a line", path = path.display())]
    Empty { path: PathBuf },
}

impl Tenants {
    pub(crate) fn open(configs: &[TenantConfig]) -> Result<Self, CoordinatorError> {
        let tenants = configs.iter().map(|config| {
            let file = config.key_file.clone().map(|path| {
                Followed::open(vec![path.clone()], move || read_keys(&path)).map_err(|source| {
                    CoordinatorError::Tenant { tenant: config.name.clone(), source }
                })
            });
            Ok::<_, CoordinatorError>(Known {
                tenant: Tenant {
                    name: config.name.as_str().into(),
                    weight: config.weight,
                    priority: config.priority,
                    budget: config
                        .max_tokens_per_minute
                        .map(|tokens| TokenBudget::new(tokens, Instant::now())),
                },
                digest: config.key_sha256,
                file: file.transpose()?,
                in_flight: config.max_requests.map(|limit| InFlightLimit {
                    limit,
                    free: Arc::new(Semaphore::new(limit as usize)),
                }),
            })
        });
        Ok(Self { tenants: tenants.collect::<Result<_, _>>()? })
    }

    /// Nobody is asked for a key.
    pub(crate) fn is_empty(&self) -> bool {
        self.tenants.is_empty()
    }

    /// Looks whether the files of keys changed.
    pub(crate) fn follow(&self) {
        for tenant in &self.tenants {
            let Some(file) = &tenant.file else { continue };
            match file.refresh() {
                Refreshed::Unchanged => {}
                Refreshed::Renewed => {
                    info!(tenant = %tenant.tenant.name, keys = file.current().len(), "a tenant's keys changed");
                }
                Refreshed::Unusable(error) => {
                    warn!(tenant = %tenant.tenant.name, %error, "a tenant's keys stay as they were");
                }
            }
        }
    }

    /// Compares with every key there is: the time tells nothing of where one that is alike stands.
    fn of_key(&self, key: &[u8]) -> Option<&Known> {
        let given: KeyDigest = Sha256::digest(key).into();
        let mut found = None;
        for tenant in &self.tenants {
            let mut is_its = Choice::from(0);
            if let Some(digest) = &tenant.digest {
                is_its |= given.ct_eq(digest);
            }
            if let Some(file) = &tenant.file {
                for digest in file.current().iter() {
                    is_its |= given.ct_eq(digest);
                }
            }
            if bool::from(is_its) && found.is_none() {
                found = Some(tenant);
            }
        }
        found
    }
}

fn read_keys(path: &Path) -> Result<Vec<KeyDigest>, KeyFileError> {
    let text = fs::read_to_string(path)
        .map_err(|source| KeyFileError::Read { path: path.to_owned(), source })?;
    let keys: Vec<_> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(|key| Sha256::digest(key).into())
        .collect();
    if keys.is_empty() { Err(KeyFileError::Empty { path: path.to_owned() }) } else { Ok(keys) }
}

fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let value = headers.get(header::AUTHORIZATION)?.as_bytes();
    let (scheme, key) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii()).filter(|key| !key.is_empty())
}

/// Lets those in who have a key, under their tenant's name.
pub(super) async fn admit(
    State((tenants, metrics)): State<(Arc<Tenants>, Arc<Metrics>)>,
    mut request: Request,
    next: Next,
) -> Response {
    let (tenant, place) = match entry(&tenants, request.headers()) {
        Ok(entered) => entered,
        Err(Refusal { tenant, outcome, error }) => {
            metrics.requests.of_tenant(tenant, outcome);
            let (parts, body) = request.into_parts();
            let mut response = refuse_unread(&error, &parts.headers, body).await;
            if let Some(id) = parts.headers.get(&REQUEST_ID) {
                response.headers_mut().insert(REQUEST_ID, id.clone());
            }
            return response;
        }
    };
    // The key is ours: engines neither need nor see it.
    request.headers_mut().remove(header::AUTHORIZATION);
    metrics.requests.of_tenant(&tenant.tenant.name, "admitted");
    request.extensions_mut().insert(tenant.tenant.clone());
    let response = next.run(request).await;
    match place {
        None => response,
        Some(place) => response.map(|body| Body::new(InFlightBody { body, _place: place })),
    }
}

/// Who is not let in, and why.
struct Refusal<'a> {
    /// Empty where the key is nobody's.
    tenant: &'a str,
    /// As the metrics name it.
    outcome: &'static str,
    error: ClientError,
}

/// Whose key it is, and the place among the requests in flight that it takes.
fn entry<'a>(
    tenants: &'a Tenants,
    headers: &HeaderMap,
) -> Result<(&'a Known, Option<OwnedSemaphorePermit>), Refusal<'a>> {
    let refusal = |tenant, outcome, error| Refusal { tenant, outcome, error };
    let key = bearer(headers).ok_or_else(|| refusal("", "no_key", ClientError::NoKey))?;
    let tenant =
        tenants.of_key(key).ok_or_else(|| refusal("", "wrong_key", ClientError::WrongKey))?;
    let name = &*tenant.tenant.name;
    let budget = tenant.tenant.budget.as_ref();
    if let Some(retry_after) = budget.and_then(|budget| budget.wait(Instant::now())) {
        return Err(refusal(name, "too_many_tokens", ClientError::TooManyTokens { retry_after }));
    }
    let Some(InFlightLimit { limit, free }) = &tenant.in_flight else { return Ok((tenant, None)) };
    match free.clone().try_acquire_owned() {
        Ok(place) => Ok((tenant, Some(place))),
        Err(_) => Err(refusal(name, "too_many", ClientError::TooManyRequests { limit: *limit })),
    }
}

/// An answer that counts as in flight until its client has it whole, or went away.
struct InFlightBody {
    body: Body,
    _place: OwnedSemaphorePermit,
}

impl http_body::Body for InFlightBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn tenant(name: &str) -> TenantConfig {
        TenantConfig {
            name: name.to_owned(),
            key_sha256: None,
            key_file: None,
            weight: 1.0,
            priority: 0,
            max_requests: None,
            max_tokens_per_minute: None,
        }
    }

    fn name_of(tenants: &Tenants, key: &str) -> Option<String> {
        tenants.of_key(key.as_bytes()).map(|known| known.tenant.name.to_string())
    }

    #[test]
    fn keys_open_for_their_tenants_and_change_with_their_file() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("keys");
        fs::write(&file, "# of spring\nold-key\n\n  new-key  \n").unwrap();
        let by_digest =
            TenantConfig { key_sha256: Some(Sha256::digest("secret").into()), ..tenant("a") };
        let by_file = TenantConfig { key_file: Some(file.clone()), ..tenant("b") };
        let tenants = Tenants::open(&[by_digest, by_file]).unwrap();
        let name = |key| name_of(&tenants, key);
        assert_eq!(name("secret").as_deref(), Some("a"));
        assert_eq!((name("old-key"), name("new-key")), (Some("b".into()), Some("b".into())));
        assert_eq!((name("# of spring"), name(""), name("secret2")), (None, None, None));

        fs::write(&file, "new-key\n").unwrap();
        tenants.follow();
        assert_eq!((name("old-key"), name("new-key")), (None, Some("b".into())));
        // A file without a key locks nobody out.
        fs::write(&file, "\n").unwrap();
        tenants.follow();
        tenants.follow();
        assert_eq!(name("new-key"), Some("b".into()));
        // What is shown of it holds no key.
        assert!(!format!("{tenants:?}").contains("new-key"));
    }

    #[test]
    fn a_key_is_what_follows_bearer() {
        let key = |value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, HeaderValue::from_static(value));
            bearer(&headers).map(|key| String::from_utf8_lossy(key).into_owned())
        };
        assert_eq!(key("Bearer abc").as_deref(), Some("abc"));
        assert_eq!(key("bearer  abc ").as_deref(), Some("abc"));
        for none in ["Bearer ", "Bearer", "Basic abc", "abc", ""] {
            assert_eq!(key(none), None, "{none:?}");
        }
        assert_eq!(bearer(&HeaderMap::new()), None);
    }
}
