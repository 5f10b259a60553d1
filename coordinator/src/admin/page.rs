//! The live page `/ui`. It comes whole out of this program; a browser fetches nothing from elsewhere.

use axum::{
    Router,
    response::{IntoResponse, Response},
    routing::get,
};
use http::{HeaderValue, header};

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";

/// Path, type and text of each part.
const PARTS: [(&str, &str, &str); 5] = [
    ("/ui", HTML, include_str!("ui/index.html")),
    ("/ui/page.css", CSS, include_str!("ui/page.css")),
    ("/ui/page.js", SCRIPT, include_str!("ui/page.js")),
    ("/ui/panels.js", SCRIPT, include_str!("ui/panels.js")),
    ("/ui/measure.js", SCRIPT, include_str!("ui/measure.js")),
];

/// What a worker calls itself can never become a script here, nor this page part of another.
const POLICY: &str = "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; \
                      img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

pub(crate) fn routes<S: Clone + Send + Sync + 'static>() -> Router<S> {
    PARTS.into_iter().fold(Router::new(), |router, (path, content_type, text)| {
        router.route(path, get(async move || part(content_type, text)))
    })
}

fn part(content_type: &'static str, text: &'static str) -> Response {
    let headers = [
        (header::CONTENT_TYPE, content_type),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-cache"),
    ]
    .map(|(name, value)| (name, HeaderValue::from_static(value)));
    (headers, text).into_response()
}
