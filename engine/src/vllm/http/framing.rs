//! An answer's head and where its body ends (RFC 9112), of bytes that come in any pieces.

use bytes::BytesMut;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};

use super::NOT_FORWARDED;

const HEAD_LIMIT_BYTES: usize = 64 << 10;
const HEADERS_LIMIT: usize = 100;
/// Of chunk extensions and trailers together, which say nothing that a client needs.
const ASIDE_LIMIT_BYTES: usize = 16 << 10;

/// What is no HTTP/1 answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(in crate::vllm) enum Malformed {
    #[error("the answer's head is malformed: {0}")]
    Head(httparse::Error),
    #[error("the answer's head has more than {HEAD_LIMIT_BYTES} bytes")]
    LongHead,
    #[error("the answer's content-length is no number, or two")]
    Length,
    #[error("the answer's chunks are malformed")]
    Chunk,
    #[error("the answer's chunks have more than {ASIDE_LIMIT_BYTES} bytes beside their data")]
    LongAside,
}

/// The head of a final answer.
#[derive(Debug)]
pub(in crate::vllm) struct Head {
    pub(in crate::vllm) status: StatusCode,
    /// Those that are not of the connection.
    pub(in crate::vllm) headers: HeaderMap,
    pub(in crate::vllm) framing: Framing,
    /// The connection may be used again.
    pub(super) keeps_alive: bool,
}

impl Head {
    /// Takes a head off the front of what has come so far, where it is all there; interim answers (1xx) before it are
    /// left out. `has_body` is false for the answer to a request that wants none, whatever it says.
    pub(in crate::vllm) fn take(
        arrived: &mut BytesMut,
        has_body: bool,
    ) -> Result<Option<Self>, Malformed> {
        while !arrived.is_empty() {
            let mut headers = [httparse::EMPTY_HEADER; HEADERS_LIMIT];
            let mut answer = httparse::Response::new(&mut headers);
            let parsed = answer.parse(arrived).map_err(Malformed::Head)?;
            let httparse::Status::Complete(length) = parsed else {
                if arrived.len() > HEAD_LIMIT_BYTES {
                    return Err(Malformed::LongHead);
                }
                return Ok(None);
            };
            // Three digits, or httparse had refused them; the first may still be a zero.
            let status = answer.code.and_then(|code| StatusCode::from_u16(code).ok());
            let status = status.ok_or(Malformed::Head(httparse::Error::Status))?;
            if !status.is_informational() {
                let head = Self::of(status, answer.version == Some(1), answer.headers, has_body)?;
                let _ = arrived.split_to(length);
                return Ok(Some(head));
            }
            let _ = arrived.split_to(length);
        }
        Ok(None)
    }

    fn of(
        status: StatusCode,
        is_http_11: bool,
        headers: &[httparse::Header<'_>],
        has_body: bool,
    ) -> Result<Self, Malformed> {
        let mut forwarded = HeaderMap::with_capacity(headers.len());
        let (mut length, mut codings, mut keeps_alive) = (None, None, is_http_11);
        for header in headers {
            // httparse takes what these do, and says so of a name or a value that they do not.
            let name = HeaderName::from_bytes(header.name.as_bytes())
                .map_err(|_| Malformed::Head(httparse::Error::HeaderName))?;
            if name == header::CONTENT_LENGTH {
                let value = decimal(header.value).ok_or(Malformed::Length)?;
                if length.replace(value).is_some_and(|former| former != value) {
                    return Err(Malformed::Length);
                }
            } else if name == header::TRANSFER_ENCODING {
                codings =
                    last_of_list(header.value).map(|last| last.eq_ignore_ascii_case(b"chunked"));
            } else if name == header::CONNECTION {
                let mut options = header.value.split(|&byte| byte == b',');
                keeps_alive &=
                    !options.any(|option| option.trim_ascii().eq_ignore_ascii_case(b"close"));
            }
            if !NOT_FORWARDED.contains(&name) {
                let value = HeaderValue::from_bytes(header.value)
                    .map_err(|_| Malformed::Head(httparse::Error::HeaderValue))?;
                forwarded.append(name, value);
            }
        }
        let has_body =
            has_body && status != StatusCode::NO_CONTENT && status != StatusCode::NOT_MODIFIED;
        // RFC 9112, 6.3, in its order.
        let framing = match (codings, length) {
            _ if !has_body => Framing::Length(0),
            (Some(true), _) => Framing::Chunked(Chunked::default()),
            (Some(false), _) | (None, None) => Framing::UntilClosed,
            (None, Some(length)) => Framing::Length(length),
        };
        keeps_alive &= !matches!(framing, Framing::UntilClosed);
        Ok(Self { status, headers: forwarded, framing, keeps_alive })
    }
}

fn decimal(value: &[u8]) -> Option<u64> {
    let digits = value.trim_ascii();
    let is_number = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    is_number.then(|| std::str::from_utf8(digits).ok()?.parse().ok()).flatten()
}

fn last_of_list(value: &[u8]) -> Option<&[u8]> {
    value.rsplit(|&byte| byte == b',').next().map(<[u8]>::trim_ascii)
}

/// What is still to come of a body.
#[derive(Clone, Copy, Debug)]
pub(in crate::vllm) enum Framing {
    /// So many bytes.
    Length(u64),
    Chunked(Chunked),
    UntilClosed,
}

/// How much of some bytes is what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::vllm) struct Cut {
    /// So many bytes of the body lie at the front now.
    pub(in crate::vllm) body: usize,
    /// Behind so many bytes, which are the body's and its framing's, comes what is not of this answer.
    pub(in crate::vllm) used: usize,
}

impl Framing {
    /// Moves the body's bytes together at the front.
    pub(in crate::vllm) fn cut(&mut self, bytes: &mut [u8]) -> Result<Cut, Malformed> {
        match self {
            Self::Length(left) => {
                let used = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                *left -= used as u64;
                Ok(Cut { body: used, used })
            }
            Self::Chunked(chunked) => chunked.cut(bytes),
            Self::UntilClosed => Ok(Cut { body: bytes.len(), used: bytes.len() }),
        }
    }

    /// Nothing is to come any more.
    pub(in crate::vllm) fn is_complete(&self) -> bool {
        match self {
            Self::Length(left) => *left == 0,
            Self::Chunked(chunked) => chunked.expects == Expects::Nothing,
            Self::UntilClosed => false,
        }
    }

    /// That the connection was closed is the body's end.
    pub(super) fn ends_with_connection(&self) -> bool {
        matches!(self, Self::UntilClosed)
    }
}

/// The chunked transfer coding (RFC 9112, 7.1), byte by byte but for the data.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::vllm) struct Chunked {
    expects: Expects,
    aside_bytes: usize,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Expects {
    #[default]
    Size,
    MoreSize(u64),
    Extension(u64),
    SizeLineFeed(u64),
    Data(u64),
    DataReturn,
    DataLineFeed,
    Trailer,
    TrailerRest,
    TrailerLineFeed,
    LastLineFeed,
    Nothing,
}

impl Chunked {
    fn cut(&mut self, bytes: &mut [u8]) -> Result<Cut, Malformed> {
        let mut cut = Cut { body: 0, used: 0 };
        while self.expects != Expects::Nothing
            && let Some(&byte) = bytes.get(cut.used)
        {
            if let Expects::Data(left) = self.expects {
                let rest = bytes.len() - cut.used;
                let length = usize::try_from(left).unwrap_or(usize::MAX).min(rest);
                bytes.copy_within(cut.used..cut.used + length, cut.body);
                cut.body += length;
                cut.used += length;
                let left = left - length as u64;
                self.expects = if left == 0 { Expects::DataReturn } else { Expects::Data(left) };
            } else {
                self.expects = self.after(byte)?;
                cut.used += 1;
            }
        }
        Ok(cut)
    }

    fn after(&mut self, byte: u8) -> Result<Expects, Malformed> {
        let digit = char::from(byte).to_digit(16).map(u64::from);
        Ok(match (self.expects, byte) {
            (Expects::Size, _) => Expects::MoreSize(digit.ok_or(Malformed::Chunk)?),
            (Expects::MoreSize(size), b'\r') => Expects::SizeLineFeed(size),
            (Expects::MoreSize(size), b';' | b' ' | b'\t') => Expects::Extension(size),
            (Expects::MoreSize(size), _) => {
                let digit = digit.ok_or(Malformed::Chunk)?;
                let size = size.checked_mul(16).ok_or(Malformed::Chunk)?;
                Expects::MoreSize(size | digit)
            }
            (Expects::Extension(size), b'\r') => Expects::SizeLineFeed(size),
            (Expects::SizeLineFeed(0), b'\n') => Expects::Trailer,
            (Expects::SizeLineFeed(size), b'\n') => Expects::Data(size),
            (Expects::DataReturn, b'\r') => Expects::DataLineFeed,
            (Expects::DataLineFeed, b'\n') => Expects::Size,
            (Expects::Trailer, b'\r') => Expects::LastLineFeed,
            (Expects::TrailerRest, b'\r') => Expects::TrailerLineFeed,
            (Expects::TrailerLineFeed, b'\n') => Expects::Trailer,
            (Expects::LastLineFeed, b'\n') => Expects::Nothing,
            // A line feed alone ends no line: who took it for an end would see other chunks than who does not.
            (expects @ Expects::Extension(_), _) if byte != b'\n' => self.aside(expects)?,
            (Expects::Trailer | Expects::TrailerRest, _) if byte != b'\n' => {
                self.aside(Expects::TrailerRest)?
            }
            _ => return Err(Malformed::Chunk),
        })
    }

    /// A byte that is passed over.
    fn aside(&mut self, expects: Expects) -> Result<Expects, Malformed> {
        self.aside_bytes += 1;
        if self.aside_bytes > ASIDE_LIMIT_BYTES { Err(Malformed::LongAside) } else { Ok(expects) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn head(text: &str) -> Result<Option<Head>, Malformed> {
        Head::take(&mut BytesMut::from(text), true)
    }

    fn framing(headers: &str) -> String {
        let head = head(&format!("HTTP/1.1 200 OK\r\n{headers}\r\n\r\n")).unwrap().unwrap();
        format!("{:?} {}", head.framing, head.keeps_alive)
    }

    #[test]
    fn a_head_says_where_its_body_ends() {
        assert_eq!(framing("content-length: 7"), "Length(7) true");
        assert_eq!(framing("Content-Length: 7\r\ncontent-length: 7"), "Length(7) true");
        assert_eq!(framing("content-length: 7\r\nConnection: x, Close"), "Length(7) false");
        assert_eq!(framing("x: y"), "UntilClosed false");
        assert_eq!(framing("transfer-encoding: gzip"), "UntilClosed false");
        for chunked in
            ["Transfer-Encoding: chunked", "transfer-encoding: gzip, Chunked\r\ncontent-length: 7"]
        {
            assert!(framing(chunked).starts_with("Chunked"), "{chunked}");
        }
        for status in ["204 No Content", "304 Not Modified"] {
            let text = format!("HTTP/1.1 {status}\r\ncontent-length: 7\r\n\r\n");
            assert!(head(&text).unwrap().unwrap().framing.is_complete());
        }
        let mut without = BytesMut::from("HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\n");
        assert!(Head::take(&mut without, false).unwrap().unwrap().framing.is_complete());
        let old = head("HTTP/1.0 200 OK\r\ncontent-length: 7\r\n\r\n").unwrap().unwrap();
        assert!(!old.keeps_alive);
    }

    #[test]
    fn a_head_is_taken_once_it_is_whole_and_without_what_is_of_the_connection() {
        let text = "HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 200 OK\r\nx-a: 1\r\nX-A: 2\r\n\
            keep-alive: 5\r\ncontent-length: 2\r\n\r\n";
        let mut arrived = BytesMut::new();
        for byte in text.bytes() {
            assert!(Head::take(&mut arrived, true).unwrap().is_none());
            arrived.extend_from_slice(&[byte]);
        }
        arrived.extend_from_slice(b"{}");
        let head = Head::take(&mut arrived, true).unwrap().unwrap();
        assert_eq!(head.status, StatusCode::OK);
        let headers: Vec<_> =
            head.headers.iter().map(|(name, value)| (name.as_str(), value)).collect();
        assert_eq!(headers, [("x-a", &HeaderValue::from(1)), ("x-a", &HeaderValue::from(2))]);
        assert_eq!(arrived, "{}");
    }

    #[test]
    fn what_is_no_head_is_refused() {
        let length =
            |value: &str| head(&format!("HTTP/1.1 200 OK\r\ncontent-length: {value}\r\n\r\n"));
        for value in ["", "-1", "+1", "0x1", "1, 1", "99999999999999999999"] {
            assert_eq!(length(value).unwrap_err(), Malformed::Length, "{value:?}");
        }
        let twice = head("HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n");
        assert_eq!(twice.unwrap_err(), Malformed::Length);
        for text in
            ["SSH-2.0-OpenSSH", "HTTP/1.1 099 X\r\n\r\n", "HTTP/1.1 200 OK\r\n a: b\r\n\r\n"]
        {
            assert!(matches!(head(text), Err(Malformed::Head(_))), "{text:?}");
        }
        let endless = format!("HTTP/1.1 200 OK\r\nx: {}", "y".repeat(HEAD_LIMIT_BYTES));
        assert_eq!(head(&endless).unwrap_err(), Malformed::LongHead);
    }

    /// The body, and what is left.
    fn decoded(pieces: &[&[u8]]) -> Result<(Vec<u8>, usize, bool), Malformed> {
        let mut framing = Framing::Chunked(Chunked::default());
        let (mut body, mut used) = (Vec::new(), 0);
        for piece in pieces {
            let mut piece = piece.to_vec();
            let cut = framing.cut(&mut piece)?;
            body.extend_from_slice(&piece[..cut.body]);
            used += cut.used;
        }
        Ok((body, used, framing.is_complete()))
    }

    #[test]
    fn chunks_are_joined_and_what_stands_beside_them_is_passed_over() {
        let text = b"4;name=\"x\"\r\nWiki\r\n0A \r\npedia in \r\r\n0\r\nTrailer: y\r\n\r\nrest";
        let (body, used, is_complete) = decoded(&[text]).unwrap();
        assert_eq!(body, b"Wikipedia in \r");
        assert_eq!((used, is_complete), (text.len() - 4, true));
    }

    #[test]
    fn malformed_chunks_are_refused() {
        for text in [
            "\r\n",
            "x\r\n",
            "-1\r\n",
            "0x1\r\n",
            "1\na\r\n",
            "1\r\nab\r\n",
            "1\r\na\n",
            "1;x\n",
            "0\r\n\n",
            "0\r\nx\n",
            "0\r\n\rx",
            "10000000000000000\r\n",
            "1 \n",
        ] {
            assert_eq!(decoded(&[text.as_bytes()]), Err(Malformed::Chunk), "{text:?}");
        }
        let beside = format!("1;{}\r\n", "x".repeat(ASIDE_LIMIT_BYTES + 1));
        assert_eq!(decoded(&[beside.as_bytes()]), Err(Malformed::LongAside));
        assert_eq!(decoded(&[b"ffffffffffffffff\r\nabc"]).unwrap(), (b"abc".to_vec(), 21, false));
    }

    proptest! {
        /// However the bytes are cut, the body is what was put into it.
        #[test]
        fn a_body_in_chunks_comes_out_as_it_went_in(
            chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..300), 0..20),
            piece_bytes in 1_usize..100,
        ) {
            let mut wire = Vec::new();
            for chunk in &chunks {
                wire.extend_from_slice(format!("{:X}\r\n", chunk.len()).as_bytes());
                wire.extend_from_slice(chunk);
                wire.extend_from_slice(b"\r\n");
            }
            wire.extend_from_slice(b"0\r\n\r\n");
            let pieces: Vec<_> = wire.chunks(piece_bytes).collect();
            prop_assert_eq!(decoded(&pieces).unwrap(), (chunks.concat(), wire.len(), true));
            let (_, _, is_complete) = decoded(&[&wire[..wire.len() - 1]]).unwrap();
            prop_assert!(!is_complete);
        }
    }
}
