use std::{
    env, fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use axum::http::{HeaderMap, header};
use baton_config::{AdminConfig, Followed, Refreshed};
use subtle::ConstantTimeEq as _;
use tracing::{info, warn};

/// Goes before `admin.token_file`.
pub const TOKEN_VARIABLE: &str = "BATON_ADMIN_TOKEN";

const SHORTEST_BYTES: usize = 16;
const LONGEST_BYTES: usize = 512;

#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    #[error("admin.token_file: missing; give a file with a token, or set {TOKEN_VARIABLE}")]
    Absent,
    #[error("admin.token_file: cannot read {}: {source}", path.display())]
    Unreadable { path: PathBuf, source: io::Error },
    #[error(
        "{origin}: a token has {SHORTEST_BYTES} to {LONGEST_BYTES} printable characters without \
         spaces, this one {0}; make one with: openssl rand -hex 32",
        fault
    )]
    Unfit { origin: String, fault: &'static str },
}

/// What operators show. It is never written anywhere.
#[derive(Clone)]
pub(crate) struct AdminToken(Arc<Source>);

enum Source {
    Environment(String),
    /// May change while the coordinator runs.
    File(Followed<String, TokenError>),
}

impl std::fmt::Debug for AdminToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AdminToken")
    }
}

impl AdminToken {
    pub(crate) fn find(config: &AdminConfig) -> Result<Self, TokenError> {
        if let Ok(text) = env::var(TOKEN_VARIABLE) {
            let token = fit(&text, || TOKEN_VARIABLE.to_owned())?;
            return Ok(Self(Arc::new(Source::Environment(token))));
        }
        let path = config.token_file.clone().ok_or(TokenError::Absent)?;
        let file = Followed::open(vec![path.clone()], move || read(&path))?;
        Ok(Self(Arc::new(Source::File(file))))
    }

    /// Looks whether its file changed.
    pub(crate) fn follow(&self) {
        let Source::File(file) = &*self.0 else { return };
        match file.refresh() {
            Refreshed::Unchanged => {}
            Refreshed::Renewed => info!("the operators' token changed"),
            Refreshed::Unusable(error) => {
                warn!(%error, "the operators' token stays as it was");
            }
        }
    }

    /// Whether a request shows it. Takes the same time whichever characters are wrong.
    pub(crate) fn is_shown_by(&self, headers: &HeaderMap) -> bool {
        let shown = headers.get(header::AUTHORIZATION).map(|value| value.as_bytes());
        let is_it = |token: &[u8]| match &*self.0 {
            Source::Environment(own) => bool::from(token.ct_eq(own.as_bytes())),
            Source::File(file) => token.ct_eq(file.current().as_bytes()).into(),
        };
        shown
            .and_then(|value| value.split_at_checked(7))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"bearer "))
            .is_some_and(|(_, token)| is_it(token))
    }
}

fn read(path: &Path) -> Result<String, TokenError> {
    let text = fs::read_to_string(path)
        .map_err(|source| TokenError::Unreadable { path: path.to_owned(), source })?;
    fit(text.lines().next().unwrap_or_default(), || format!("admin.token_file: {}", path.display()))
}

/// A token that can be sent, and not be guessed.
fn fit(text: &str, origin: impl Fn() -> String) -> Result<String, TokenError> {
    let token = text.trim();
    let fault = match token.len() {
        0..SHORTEST_BYTES => "is shorter",
        SHORTEST_BYTES..=LONGEST_BYTES if token.bytes().all(|byte| byte.is_ascii_graphic()) => {
            return Ok(token.to_owned());
        }
        SHORTEST_BYTES..=LONGEST_BYTES => "has others",
        _ => "is longer",
    };
    Err(TokenError::Unfit { origin: origin(), fault })
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    const TOKEN: &str = "0123456789abcdef";

    fn shows(token: &AdminToken, value: &str) -> bool {
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, HeaderValue::from_str(value).unwrap());
        token.is_shown_by(&headers)
    }

    #[test]
    fn only_the_token_itself_is_let_in() {
        let token = fit(&format!(" {TOKEN}\n"), String::new).unwrap();
        let token = AdminToken(Arc::new(Source::Environment(token)));
        assert!(shows(&token, &format!("Bearer {TOKEN}")));
        assert!(shows(&token, &format!("bearer {TOKEN}")));
        for wrong in ["", "Bearer", "Bearer ", "Bearer 0123456789abcdeg", TOKEN] {
            assert!(!shows(&token, wrong), "{wrong}");
        }
        assert!(!shows(&token, &format!("Bearer {TOKEN}0")));
        assert!(!shows(&token, &format!("Basic  {TOKEN}")));
        assert!(!token.is_shown_by(&HeaderMap::new()));
        assert_eq!(format!("{token:?}"), "AdminToken");
    }

    #[test]
    fn a_new_token_in_the_file_takes_the_former_ones_place_and_an_unfit_one_does_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("admin.token");
        // As careful people do, and other than by the clock's grain to be told apart.
        let put = |text: &str| {
            let beside = path.with_extension("new");
            fs::write(&beside, text).unwrap();
            fs::rename(beside, &path).unwrap();
        };
        put(TOKEN);
        let config = AdminConfig { token_file: Some(path.clone()), ..AdminConfig::default() };
        let token = AdminToken::find(&config).unwrap();
        assert!(shows(&token, &format!("Bearer {TOKEN}")));
        put("short");
        token.follow();
        token.follow();
        assert!(shows(&token, &format!("Bearer {TOKEN}")) && !shows(&token, "Bearer short"));
        put("fedcba9876543210");
        token.follow();
        assert!(shows(&token, "Bearer fedcba9876543210"));
        assert!(!shows(&token, &format!("Bearer {TOKEN}")));
    }

    #[test]
    fn a_token_that_could_be_guessed_or_not_be_sent_is_refused() {
        let refusal = |text: &str| fit(text, || "here".into()).unwrap_err().to_string();
        assert!(refusal("").starts_with("here: a token has 16 to 512 printable characters"));
        assert!(refusal("short").contains("this one is shorter"));
        assert!(refusal("0123456789 bcdef").contains("this one has others"));
        assert!(refusal(&"x".repeat(513)).contains("this one is longer"));
        let absent = AdminToken::find(&AdminConfig::default());
        assert!(matches!(absent, Err(TokenError::Absent)), "{absent:?}");
        let config = AdminConfig { token_file: Some("/no/file".into()), ..AdminConfig::default() };
        let told = AdminToken::find(&config).unwrap_err().to_string();
        assert!(told.starts_with("admin.token_file: cannot read /no/file: "), "{told}");
    }
}
