use std::{env, fs, io, path::PathBuf};

use axum::http::{HeaderMap, header};
use baton_config::AdminConfig;
use subtle::ConstantTimeEq as _;

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
pub(crate) struct AdminToken(String);

impl std::fmt::Debug for AdminToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AdminToken")
    }
}

impl AdminToken {
    pub(crate) fn find(config: &AdminConfig) -> Result<Self, TokenError> {
        if let Ok(token) = env::var(TOKEN_VARIABLE) {
            return Self::of(&token, || TOKEN_VARIABLE.to_owned());
        }
        let path = config.token_file.as_ref().ok_or(TokenError::Absent)?;
        let text = fs::read_to_string(path)
            .map_err(|source| TokenError::Unreadable { path: path.clone(), source })?;
        Self::of(text.lines().next().unwrap_or_default(), || {
            format!("admin.token_file: {}", path.display())
        })
    }

    fn of(text: &str, origin: impl Fn() -> String) -> Result<Self, TokenError> {
        let token = text.trim();
        let fault = match token.len() {
            0..SHORTEST_BYTES => "is shorter",
            SHORTEST_BYTES..=LONGEST_BYTES if token.bytes().all(|byte| byte.is_ascii_graphic()) => {
                return Ok(Self(token.to_owned()));
            }
            SHORTEST_BYTES..=LONGEST_BYTES => "has others",
            _ => "is longer",
        };
        Err(TokenError::Unfit { origin: origin(), fault })
    }

    /// Whether a request shows it. Takes the same time whichever characters are wrong.
    pub(crate) fn is_shown_by(&self, headers: &HeaderMap) -> bool {
        let shown = headers.get(header::AUTHORIZATION).map(|value| value.as_bytes());
        shown
            .and_then(|value| value.split_at_checked(7))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"bearer "))
            .is_some_and(|(_, token)| token.ct_eq(self.0.as_bytes()).into())
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    const TOKEN: &str = "0123456789abcdef";

    #[test]
    fn only_the_token_itself_is_let_in() {
        let token = AdminToken::of(&format!(" {TOKEN}\n"), String::new).unwrap();
        let shows = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, HeaderValue::from_str(value).unwrap());
            token.is_shown_by(&headers)
        };
        assert!(shows(&format!("Bearer {TOKEN}")));
        assert!(shows(&format!("bearer {TOKEN}")));
        for wrong in ["", "Bearer", "Bearer ", "Bearer 0123456789abcdeg", TOKEN] {
            assert!(!shows(wrong), "{wrong}");
        }
        assert!(!shows(&format!("Bearer {TOKEN}0")));
        assert!(!shows(&format!("Basic  {TOKEN}")));
        assert!(!token.is_shown_by(&HeaderMap::new()));
        assert_eq!(format!("{token:?}"), "AdminToken");
    }

    #[test]
    fn a_token_that_could_be_guessed_or_not_be_sent_is_refused() {
        let refusal = |text: &str| AdminToken::of(text, || "here".into()).unwrap_err().to_string();
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
