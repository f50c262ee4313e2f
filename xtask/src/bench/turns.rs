//! Taking turns: the contenders of a length run one after the other, round by round, until each has its samples.

use super::work::Pass;
use anyhow::Result;
use std::time::Instant;

/// A first turn that is shorter than this many seconds only warms up: it touches memory for the first time.
const WARM_UP_S: f64 = 2.0;

/// So does a longer one, if several are asked for and it takes no more than this part of the budget.
const WARM_UP_SHARE: f64 = 0.4;

/// How often a contender runs.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Turns that count.
    pub samples: usize,
    /// No further turn begins after this many seconds of turns, once one counts.
    pub budget_s: f64,
    /// Whether the first turn only warms up, however long it takes: on a device it compiles kernels.
    pub compiles: bool,
}

impl Plan {
    /// Seconds that a first turn may take that only warms up.
    fn warm_up_s(&self) -> f64 {
        if self.compiles {
            return f64::INFINITY;
        }
        if self.samples > 1 { WARM_UP_S.max(WARM_UP_SHARE * self.budget_s) } else { WARM_UP_S }
    }
}

/// Seconds of the passes of a turn.
pub type Seconds = Vec<(Pass, f64)>;

/// What a contender's turns gave, or why it has none.
pub type Outcome<S> = Result<Vec<S>, String>;

/// Lets contenders take turns; `turn(i)` runs contender i and says what it took, or why it cannot run.
///
/// # Errors
/// If a turn fails, other than by saying that it cannot run.
pub fn take<S>(
    plans: &[Plan],
    mut turn: impl FnMut(usize, usize) -> Result<Result<S, String>>,
) -> Result<Vec<Outcome<S>>> {
    let mut outcomes: Vec<Outcome<S>> = plans.iter().map(|_| Ok(Vec::new())).collect();
    let mut spent_s = vec![0.0; plans.len()];
    let wants = |outcome: &Outcome<S>, plan: &Plan, spent_s: f64| match outcome {
        Ok(turns) => turns.is_empty() || (turns.len() < plan.samples && spent_s < plan.budget_s),
        Err(_) => false,
    };
    for round in 0.. {
        let mut ran = false;
        for (i, plan) in plans.iter().enumerate() {
            let Ok(turns) = &mut outcomes[i] else { continue };
            let counted = turns.len();
            if !wants(&outcomes[i], plan, spent_s[i]) {
                continue;
            }
            ran = true;
            let start = Instant::now();
            let seconds = turn(i, counted)?;
            let took_s = start.elapsed().as_secs_f64();
            let warms_up = round == 0 && took_s < plan.warm_up_s();
            // What is compiled once is not the contender's time.
            spent_s[i] += if warms_up && plan.compiles { 0.0 } else { took_s };
            match (seconds, &mut outcomes[i]) {
                (Ok(_), _) if warms_up => {}
                (Ok(seconds), Ok(turns)) => turns.push(seconds),
                (Err(reason), outcome) => *outcome = Err(reason),
                (Ok(_), Err(_)) => {}
            }
        }
        if !ran {
            break;
        }
    }
    Ok(outcomes)
}

/// Median, least and greatest of some times.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Times {
    /// Of two in the middle, their mean.
    pub median_s: f64,
    /// The fastest.
    pub min_s: f64,
    /// The slowest.
    pub max_s: f64,
    /// How many there are.
    pub samples: usize,
}

impl Times {
    /// Of a pass in all turns; None if no turn has it.
    pub fn of(turns: &[Seconds], pass: Pass) -> Option<Self> {
        Self::of_all(turns.iter().flatten().filter(|(p, _)| *p == pass).map(|&(_, s)| s))
    }

    /// Of some seconds; None if there are none.
    pub fn of_all(seconds: impl Iterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = seconds.collect();
        sorted.sort_by(f64::total_cmp);
        let (min_s, max_s) = (*sorted.first()?, *sorted.last()?);
        let (low, high) = (sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
        Some(Self { median_s: (low + high) / 2.0, min_s, max_s, samples: sorted.len() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn contenders_alternate_and_the_first_round_warms_up() {
        let plans =
            [Plan { samples: 2, budget_s: 9.0, compiles: false }, Plan { samples: 3, budget_s: 9.0, compiles: false }];
        let mut order = Vec::new();
        let outcomes = take(&plans, |i, _| {
            order.push(i);
            Ok(Ok(vec![(Pass::Forward, order.len() as f64)]))
        });
        let outcomes = outcomes.expect("no turn fails");
        assert_eq!(order, [0, 1, 0, 1, 0, 1, 1]);
        let first = outcomes[0].as_ref().expect("it runs");
        let expected = Times { median_s: 4.0, min_s: 3.0, max_s: 5.0, samples: 2 };
        assert_eq!(Times::of(first, Pass::Forward), Some(expected));
        assert_eq!(Times::of(first, Pass::Decode), None);
        assert_eq!(outcomes[1].as_ref().expect("it runs").len(), 3);
    }

    #[test]
    fn a_long_first_turn_warms_up_where_several_fit() {
        let warm_up_s = |samples, budget_s| Plan { samples, budget_s, compiles: false }.warm_up_s();
        assert_eq!([warm_up_s(1, 60.0), warm_up_s(3, 60.0), warm_up_s(3, 1.0)], [2.0, 24.0, 2.0]);
    }

    #[test]
    fn a_turn_that_compiles_never_counts() {
        let mut turns = 0;
        let plan = Plan { samples: 1, budget_s: 1e-3, compiles: true };
        let turn = |_, _| {
            turns += 1;
            std::thread::sleep(Duration::from_millis(2));
            Ok(Ok(vec![(Pass::Decode, f64::from(turns))]))
        };
        let outcomes = take(&[plan], turn).expect("no turn fails");
        assert_eq!(outcomes[0], Ok(vec![vec![(Pass::Decode, 2.0)]]));
        assert_eq!(plan.warm_up_s(), f64::INFINITY);
    }

    #[test]
    fn a_spent_budget_leaves_one_sample() {
        let turn = |_, _| {
            std::thread::sleep(Duration::from_millis(2));
            Ok(Ok(vec![(Pass::Decode, 1.0)]))
        };
        let outcomes = take(&[Plan { samples: 5, budget_s: 1e-3, compiles: false }], turn).expect("no turn fails");
        assert_eq!(outcomes[0].as_ref().expect("it runs").len(), 1);
    }

    #[test]
    fn who_cannot_run_is_asked_once() {
        let mut asked = 0;
        let plans = [Plan { samples: 3, budget_s: 9.0, compiles: false }; 2];
        let outcomes = take(&plans, |i, _| {
            asked += usize::from(i == 1);
            Ok(if i == 1 { Err("no memory".to_owned()) } else { Ok(vec![(Pass::Forward, 1.0)]) })
        });
        let outcomes = outcomes.expect("no turn fails");
        assert_eq!(outcomes[1], Err("no memory".to_owned()));
        assert_eq!((outcomes[0].as_ref().map(Vec::len), asked), (Ok(3), 1));
        assert!(take::<Seconds>(&plans, |_, _| anyhow::bail!("broken")).is_err());
    }
}
