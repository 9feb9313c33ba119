//! Level 7. Numbers as a report writes them. Spaces within them do not break.

use crate::cli::output::thousands;

/// Where there is no number.
pub(super) const NONE: &str = "–";

/// `0.653` as `65.3 %`.
pub(super) fn percent(share: f64) -> String {
    if share.is_finite() { format!("{:.1}\u{a0}%", 100.0 * share) } else { NONE.to_owned() }
}

/// Some number, or the sign for none.
pub(super) fn or_none<T>(number: Option<T>, write: impl Fn(T) -> String) -> String {
    number.map_or_else(|| NONE.to_owned(), write)
}

/// Seconds; minutes and hours where they are many.
pub(super) fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        0..120 => format!("{seconds:.1}\u{a0}s"),
        120..7200 => format!("{}\u{a0}min {}\u{a0}s", whole / 60, whole % 60),
        _ => format!("{}\u{a0}h {}\u{a0}min", whole / 3600, whole % 3600 / 60),
    }
}

/// A whole number with its digits in groups.
pub(super) fn count(number: f64) -> String {
    thousands(number.round().max(0.0) as usize)
}

/// `8222010` as `8.22 M`.
pub(super) fn rounded(number: usize) -> String {
    let value = number as f64;
    match number {
        0..10_000 => thousands(number),
        10_000..1_000_000 => format!("{:.1}\u{a0}k", value / 1e3),
        1_000_000..1_000_000_000 => format!("{:.2}\u{a0}M", value / 1e6),
        _ => format!("{:.2}\u{a0}G", value / 1e9),
    }
}

/// As few digits as tell it from its neighbours on an axis.
pub(super) fn short(number: f64) -> String {
    let size = number.abs();
    if size >= 1e4 {
        let sign = if number < 0.0 { "−" } else { "" };
        return format!("{sign}{}", count(size));
    }
    // What is left of steps that binary numbers do not hold.
    let digits = if size < 1e-9 { 0 } else { (4 - size.log10().floor() as i32).clamp(0, 12) as usize };
    let text = format!("{number:.digits$}");
    let text = if digits > 0 { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    if (1e-9..1e-4).contains(&size) { format!("{:e}", text.parse::<f64>().unwrap_or(number)) } else { text.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let cases = [
            (0.0, "0"),
            (0.1 + 0.2, "0.3"),
            (-2.5, "-2.5"),
            (0.0005, "0.0005"),
            (2e-5, "2e-5"),
            (784.0, "784"),
            (12000.0, "12,000"),
        ];
        for (number, want) in cases {
            assert_eq!(short(number), want);
        }
        assert_eq!((rounded(8_222_010).as_str(), rounded(999).as_str()), ("8.22\u{a0}M", "999"));
        assert_eq!((duration(60.04).as_str(), duration(754.0).as_str()), ("60.0\u{a0}s", "12\u{a0}min 34\u{a0}s"));
        assert_eq!(duration(7300.0), "2\u{a0}h 1\u{a0}min");
        assert_eq!((percent(0.6532).as_str(), percent(f64::NAN).as_str()), ("65.3\u{a0}%", "–"));
    }
}
