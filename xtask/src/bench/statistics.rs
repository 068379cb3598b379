//! Medians and quantiles.

/// The middle of `values`; NaN without any.
pub fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

/// The value below which `part` of all values lie, interpolated.
pub fn quantile(values: &[f64], part: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let at = part * last as f64;
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    low + (high - low) * at.fract()
}

/// Between which two of `values` the median of all that could have been measured lies, with 90 % or more if there are five
/// or more of them; NaN without any.
///
/// It is below the `k` lowest of `n` as often as a coin falls on one side fewer than `k` times of `n` (the sign test). Of
/// seven values or fewer these are the lowest and the highest.
pub fn spread(values: &[f64]) -> (f64, f64) {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return (f64::NAN, f64::NAN) };
    let n = sorted.len() as f64;
    // Of 2^n series of throws, those with exactly `cut` on one side, and with fewer.
    let (mut exactly, mut fewer, mut cut) = (0.5f64.powf(n), 0.0, 0usize);
    while fewer + exactly <= 0.05 {
        fewer += exactly;
        cut += 1;
        exactly *= (n - cut as f64 + 1.0) / cut as f64;
    }
    // Half of all series have no more than half of the throws on one side: `cut` stays below the middle.
    let outermost = cut.saturating_sub(1);
    (sorted[outermost], sorted[last - outermost])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < f64::EPSILON);
        assert!((median(&[4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < f64::EPSILON);
        assert!((quantile(&[1.0, 2.0, 3.0, 4.0, 5.0], 0.25) - 2.0).abs() < f64::EPSILON);
        assert!(median(&[]).is_nan() && spread(&[]).0.is_nan());
    }

    #[test]
    fn spreads() {
        let first = |n: u32| spread(&(0..n).map(f64::from).collect::<Vec<_>>());
        assert_eq!(spread(&[2.0, 3.0, 1.0]), (1.0, 3.0));
        // Binomial tails: 2 / 2^5, 2 / 2^7, 2 (1 + 8) / 2^8, 2 (1 + 12 + 66) / 2^12, ...
        assert_eq!([1, 5, 7, 8].map(first), [(0.0, 0.0), (0.0, 4.0), (0.0, 6.0), (1.0, 6.0)]);
        assert_eq!([12, 100].map(first), [(2.0, 9.0), (41.0, 58.0)]);
    }
}
