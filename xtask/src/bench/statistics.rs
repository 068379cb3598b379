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

/// The lowest and the highest of `values`; NaN without any. Of five, they hold the median of all that could have been
/// measured with 94 %: it is below or above all of them as often as a coin falls five times on the same side.
pub fn range(values: &[f64]) -> (f64, f64) {
    (quantile(values, 0.0), quantile(values, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < f64::EPSILON);
        assert!((median(&[4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < f64::EPSILON);
        assert!((quantile(&[1.0, 2.0, 3.0, 4.0, 5.0], 0.25) - 2.0).abs() < f64::EPSILON);
        assert!(median(&[]).is_nan() && range(&[]).0.is_nan());
        assert_eq!(range(&[2.0, 3.0, 1.0]), (1.0, 3.0));
    }
}
