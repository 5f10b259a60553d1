//! Numbers as people read them. What is not a number reads as "no data".

/// Three significant digits, thousands apart: 0.0123, 4.56, 78.9, 12,345.
pub fn figures(value: f64) -> String {
    if !value.is_finite() {
        return "no data".to_owned();
    }
    let size = value.abs();
    let decimals = match size {
        0.0 => 0,
        s if s >= 99.95 => 0,
        s if s >= 9.995 => 1,
        s if s >= 0.9995 => 2,
        _ => 3,
    };
    thousands(&format!("{value:.decimals$}"))
}

/// A label of an axis, whose steps are round already.
pub fn tick(value: f64) -> String {
    thousands(&format!("{}", (value * 1e6).round() / 1e6))
}

fn thousands(number: &str) -> String {
    let (sign, number) = number.strip_prefix('-').map_or(("", number), |rest| ("−", rest));
    let (whole, fraction) = number.split_once('.').map_or((number, None), |(w, f)| (w, Some(f)));
    let mut text = sign.to_owned();
    for (i, digit) in whole.chars().enumerate() {
        if i > 0 && (whole.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    if let Some(fraction) = fraction {
        text.push('.');
        text.push_str(fraction);
    }
    text
}

/// "850 ms", "1.25 s", "4.0 min".
pub fn span(ms: f64) -> String {
    if !ms.is_finite() {
        "no data".to_owned()
    } else if ms < 999.5 {
        format!("{} ms", figures(ms))
    } else if ms < 120_000.0 {
        format!("{} s", figures(ms / 1e3))
    } else {
        format!("{} min", figures(ms / 60_000.0))
    }
}

/// A label of a time axis: "50 ms", "2 s".
pub fn span_tick(ms: f64) -> String {
    if ms < 999.5 { format!("{} ms", tick(ms)) } else { format!("{} s", tick(ms / 1e3)) }
}

/// One decimal, save where it would round to a whole that it is not: 99.96 % is not 100 %.
pub fn percent(share: f64) -> String {
    if !share.is_finite() {
        return "no data".to_owned();
    }
    let mut tenths = (share * 1_000.0).round();
    if share < 1.0 {
        tenths = tenths.min(999.0);
    }
    if share > 0.0 {
        tenths = tenths.max(1.0);
    }
    format!("{} %", tick(tenths / 10.0))
}

/// "11 % more", "4 % less", "as much".
pub fn more_or_less(value: f64, than: f64) -> Option<String> {
    let change = (value / than - 1.0) * 100.0;
    if !change.is_finite() {
        return None;
    }
    Some(match change.round() {
        0.0 => "as much".to_owned(),
        c if c > 0.0 => format!("{} % more", tick(c)),
        c => format!("{} % less", tick(-c)),
    })
}

/// "1.2 GB", in powers of ten.
pub fn bytes(count: u64) -> String {
    let value = float(count);
    let (unit, size) = [("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)]
        .into_iter()
        .find(|(_, size)| value >= *size)
        .unwrap_or(("B", 1.0));
    format!("{} {unit}", figures(value / size))
}

/// Exact up to 2^53, which no count here reaches.
#[allow(clippy::cast_precision_loss, reason = "counts stay far below 2^53")]
fn float(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(figures(0.0), "0");
        assert_eq!(figures(0.0123), "0.012");
        assert_eq!(figures(27.83), "27.8");
        assert_eq!(figures(12_345.6), "12,346");
        assert_eq!(figures(-1_500.0), "−1,500");
        assert_eq!(figures(f64::NAN), "no data");
        assert_eq!(span(850.0), "850 ms");
        assert_eq!(span(1_250.0), "1.25 s");
        assert_eq!(span(240_000.0), "4.00 min");
        assert_eq!(span_tick(0.5), "0.5 ms");
        assert_eq!(percent(0.9996), "99.9 %");
        assert_eq!(percent(0.000_01), "0.1 %");
        assert_eq!(percent(1.0), "100 %");
        assert_eq!(percent(f64::INFINITY), "no data");
        assert_eq!(more_or_less(23.6, 21.2).as_deref(), Some("11 % more"));
        assert_eq!(more_or_less(25.2, 32.7).as_deref(), Some("23 % less"));
        assert_eq!(more_or_less(1.0, 0.0), None);
        assert_eq!(bytes(1_234_000_000), "1.23 GB");
    }
}
