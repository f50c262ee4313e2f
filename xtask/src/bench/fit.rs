//! Laws through measured points: exponents and break-even lengths.

/// A length and a time.
pub type Point = (f64, f64);

/// Exponent of the power law through the points: least squares on logarithms. None for fewer than two lengths.
pub fn exponent(points: &[Point]) -> Option<f64> {
    let n = points.len() as f64;
    let mean = |of: fn(&Point) -> f64| points.iter().map(of).sum::<f64>() / n;
    let (mean_x, mean_y) = (mean(|p| p.0.ln()), mean(|p| p.1.ln()));
    let spread: f64 = points.iter().map(|p| (p.0.ln() - mean_x).powi(2)).sum();
    let common: f64 = points.iter().map(|p| (p.0.ln() - mean_x) * (p.1.ln() - mean_y)).sum();
    (points.len() > 1 && spread > 0.0).then(|| common / spread)
}

/// From which length on one is faster than the other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum BreakEven {
    /// At every length measured, from this one on.
    Below(f64),
    /// Between two lengths, by a power law between them.
    At(f64),
    /// Not up to this length.
    Beyond(f64),
}

/// Where `ours` gets faster than `theirs` for good, on the lengths that both have, ascending. None if there is no such length.
pub fn break_even(ours: &[Point], theirs: &[Point]) -> Option<BreakEven> {
    let ratios: Vec<Point> = ours
        .iter()
        .filter_map(|&(tokens, seconds)| Some((tokens, seconds / theirs.iter().find(|p| p.0 == tokens)?.1)))
        .collect();
    let (first, last) = (ratios.first()?, ratios.last()?);
    if last.1 >= 1.0 {
        return Some(BreakEven::Beyond(last.0));
    }
    let Some(at) = ratios.iter().rposition(|&(_, ratio)| ratio >= 1.0) else {
        return Some(BreakEven::Below(first.0));
    };
    let ((x0, y0), (x1, y1)) = (ratios[at], ratios[at + 1]);
    let share = y0.ln() / (y0.ln() - y1.ln());
    Some(BreakEven::At((x0.ln() + share * (x1.ln() - x0.ln())).exp()))
}

impl std::fmt::Display for BreakEven {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Below(tokens) => write!(f, "≤ {tokens}"),
            Self::At(tokens) => write!(f, "{tokens:.0}"),
            Self::Beyond(tokens) => write!(f, "> {tokens}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn law(factor: f64, power: f64) -> Vec<Point> {
        [1024.0, 2048.0, 4096.0, 8192.0].map(|t: f64| (t, factor * t.powf(power))).to_vec()
    }

    #[test]
    fn exponents_of_power_laws() {
        for power in [0.5, 1.0, 1.36, 2.0] {
            let fitted = exponent(&law(3e-7, power)).expect("four lengths");
            assert!((fitted - power).abs() < 1e-9, "{fitted} for {power}");
        }
        assert_eq!(exponent(&law(1.0, 2.0)[..1]), None);
        assert_eq!(exponent(&[]), None);
        assert_eq!(exponent(&[(8.0, 1.0), (8.0, 2.0)]), None);
    }

    #[test]
    fn break_even_of_two_laws() {
        // c·t = t² at t = c, wherever it lies between the lengths.
        for crossing in [1500.0, 2048.0, 3000.0, 8000.0] {
            match break_even(&law(crossing, 1.0), &law(1.0, 2.0)) {
                Some(BreakEven::At(found)) => assert!((found / crossing - 1.0).abs() < 1e-9, "{found}"),
                other => panic!("{other:?} for {crossing}"),
            }
        }
        assert_eq!(break_even(&law(500.0, 1.0), &law(1.0, 2.0)), Some(BreakEven::Below(1024.0)));
        assert_eq!(break_even(&law(9000.0, 1.0), &law(1.0, 2.0)), Some(BreakEven::Beyond(8192.0)));
    }

    #[test]
    fn break_even_takes_common_lengths_and_the_last_crossing() {
        assert_eq!(break_even(&law(1.0, 1.0), &[(512.0, 1.0)]), None);
        assert_eq!(break_even(&law(3000.0, 1.0), &law(1.0, 2.0)[..2]), Some(BreakEven::Beyond(2048.0)));
        let (ours, theirs) = ([(1.0, 0.5), (2.0, 2.0), (4.0, 0.5)], [(1.0, 1.0), (2.0, 1.0), (4.0, 1.0)]);
        match break_even(&ours, &theirs) {
            Some(BreakEven::At(found)) => assert!((found - 8f64.sqrt()).abs() < 1e-9, "{found}"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn break_even_is_shown_as_a_bound_or_a_length() {
        assert_eq!(BreakEven::Below(1024.0).to_string(), "≤ 1024");
        assert_eq!(BreakEven::At(1499.7).to_string(), "1500");
        assert_eq!(BreakEven::Beyond(8192.0).to_string(), "> 8192");
    }
}
