//! Quantities as people read them.

use std::time::Duration;

pub(crate) fn milliseconds(seconds: f64) -> String {
    let ms = seconds * 1e3;
    if ms < 10.0 { format!("{ms:.1} ms") } else { format!("{ms:.0} ms") }
}

pub(crate) fn speed(bytes_per_second: f64) -> String {
    if bytes_per_second > 0.0 { format!("{}/s", bytes(bytes_per_second)) } else { "–".to_owned() }
}

pub(crate) fn bytes(bytes: f64) -> String {
    match bytes {
        // Fast networks are spoken of in GB/s.
        1e8.. => format!("{:.2} GB", bytes / 1e9),
        1e6.. => format!("{:.1} MB", bytes / 1e6),
        1e3.. => format!("{:.1} kB", bytes / 1e3),
        _ => format!("{bytes:.0} B"),
    }
}

pub(crate) fn duration(duration: Duration) -> String {
    match duration.as_secs() {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7200 => format!("{} min", seconds / 60),
        seconds @ 7200..172_800 => format!("{} h", seconds / 3600),
        seconds => format!("{} d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        assert_eq!(milliseconds(0.0123), "12 ms");
        assert_eq!(milliseconds(0.0012), "1.2 ms");
        assert_eq!(bytes(0.0), "0 B");
        assert_eq!(bytes(16384.0), "16.4 kB");
        assert_eq!(bytes(2.54e9), "2.54 GB");
        assert_eq!(speed(0.0), "–");
        assert_eq!(speed(417e6), "0.42 GB/s");
        assert_eq!(speed(16384.0), "16.4 kB/s");
        let spans = [59, 600, 7200, 200_000].map(|s| duration(Duration::from_secs(s)));
        assert_eq!(spans, ["59 s", "10 min", "2 h", "2 d"]);
    }
}
