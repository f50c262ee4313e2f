//! Selection blocks that tie exactly. With queries of zero every visible compression block is as likely as another, so that
//! blocks with the same weights have the same score, whatever the rounding.

use crate::check::attention_inputs;
use crate::kernels::{Attention, Pattern};
use crate::operator::{self, Inputs};
use crate::{Case, Kind, decode};
use nsa_core::{NsaConfig, NsaConfigBuilder, index};
use nsa_kernels::Backend;

/// That of equal blocks the lower ones are selected (SPEC 2.2), by `cmp::forward` for every query and by decoding steps.
///
/// # Panics
/// If a list differs, or the backend does not compute: how the test fails.
pub fn assert_lower_blocks<T: Kind>(backend: &Backend, builder: NsaConfigBuilder, lengths: &[usize]) {
    let case = Case::new("ties", builder, lengths);
    let mut inputs: Attention<T> = attention_inputs(&case, Pattern::Cmp);
    inputs.q.fill(T::default());
    let lists = inputs.forward(backend).expect("cmp::forward").block_indices;
    let positions: Vec<usize> = lengths.iter().flat_map(|&length| 0..length).collect();
    assert_lists(&case.config, "cmp::forward", &positions, &lists);

    let mut whole = Inputs::<T>::generate(&case);
    whole.q.fill(T::default());
    let cpu = Backend::pick(Some("cpu")).expect("the CPU").0;
    let blocks = operator::blocks(&cpu, &whole).expect("blocks");
    let last = |(s, &length): (usize, &usize)| [length / 3, length - 1].map(|t| (s, t, t + 1));
    let chunks: Vec<_> = lengths.iter().enumerate().flat_map(last).collect();
    let steps = decode::take(&whole, &blocks, &chunks).expect("queries of the case");
    let lists = decode::step(backend, &steps, case.config.select_block()).expect("decode::step").block_indices;
    let positions: Vec<usize> = chunks.iter().map(|&(_, t, _)| t).collect();
    assert_lists(&case.config, "decode::step", &positions, &lists);
}

fn assert_lists(config: &NsaConfig, op: &str, positions: &[usize], lists: &[i32]) {
    let count = config.select_count();
    for (&t, lists) in positions.iter().zip(lists.chunks(config.num_kv_heads() * count)) {
        let expected = expected(config, t);
        for list in lists.chunks(count) {
            assert_eq!(list, expected, "{op}, position {t}");
        }
    }
}

/// The list of a query at position `t`, by the weights alone.
fn expected(config: &NsaConfig, t: usize) -> Vec<i32> {
    let (visible, candidates) = (index::visible_blocks(config, t), index::num_candidates(config, t));
    let weight = |j| (0..visible).map(|i| index::importance_weight(config, i, j)).sum::<usize>();
    let local = candidates.saturating_sub(config.select_local());
    let forced = |&j: &usize| j < config.select_initial() || j >= local;
    let (mut chosen, mut free): (Vec<_>, Vec<_>) = (0..candidates).partition(forced);
    free.sort_by_key(|&j| (usize::MAX - weight(j), j));
    free.truncate(config.select_count().saturating_sub(chosen.len()));
    chosen.append(&mut free);
    chosen.sort_unstable();
    let mut list: Vec<i32> = chosen.into_iter().map(|j| j as i32).collect();
    list.resize(config.select_count(), -1);
    list
}
