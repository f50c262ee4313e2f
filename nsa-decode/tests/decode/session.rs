//! Forks, truncation, batches, and what a session refuses.

use crate::kit::{Checkpoint, relative_error, small, small_dense, tokens, widen};
use nsa_core::{CompressKind, index};
use nsa_decode::{Error, Model, Session, SessionOptions, advance};

fn options(chunk: usize, undo: usize) -> SessionOptions {
    SessionOptions { chunk, undo }
}

fn session(model: &Model, chunk: usize, undo: usize, tokens: &[u32]) -> Session {
    let mut session = model.session_with(options(chunk, undo)).unwrap();
    session.append(tokens).unwrap();
    session
}

/// Logits of `session` and of a few more tokens, bit for bit those of a session that never had more.
fn same_as_fresh(session: &mut Session, fresh: &mut Session) {
    assert_eq!(session.tokens(), fresh.tokens());
    for token in tokens(99, 20) {
        let len = fresh.len();
        assert_eq!(session.logits().unwrap(), fresh.logits().unwrap(), "after {len} tokens");
        session.push(&[token]).unwrap();
        fresh.push(&[token]).unwrap();
    }
}

#[test]
fn truncated_sessions_equal_fresh_ones() {
    let tokens = tokens(1, 70);
    let sparse = Checkpoint::new(small(CompressKind::Mlp), 20).open();
    let dense = Checkpoint::new(small_dense(), 21).open();
    for model in [&sparse, &dense] {
        for len in [1, 7, 8, 30, 69, 70] {
            // Computed again, in the same chunks as the fresh one.
            let mut cut = session(model, 16, 0, &tokens);
            cut.truncate(len).unwrap();
            let mut fresh = session(model, 16, 0, &tokens[..len]);
            // A chunk that the cut goes through was one pass in the one session and is another in the other.
            for token in crate::kit::tokens(98, 20) {
                let expected = widen(fresh.logits().unwrap());
                assert!(relative_error(cut.logits().unwrap(), &expected) < 3e-5);
                cut.push(&[token]).unwrap();
                fresh.push(&[token]).unwrap();
            }
        }
    }
}

#[test]
fn steps_taken_back_leave_no_trace() {
    let (prompt, more) = (tokens(2, 40), tokens(3, 25));
    let model = Checkpoint::new(small(CompressKind::Linear), 22).open();
    let fresh = session(&model, 64, 0, &prompt);
    for steps in [1, 3, 4, 8, 24, 25] {
        // One step more is taken back for the logits of the last token.
        for undo in [0, steps, steps + 1, 100, usize::MAX] {
            let mut session = session(&model, 64, undo, &prompt);
            for token in &more[..steps] {
                session.append(&[*token]).unwrap();
            }
            let computed = session.reads().steps;
            session.truncate(prompt.len()).unwrap();
            session.push(&more[..1]).unwrap();
            // Within `undo` the prompt is not computed again: one step does it.
            session.logits().unwrap();
            assert_eq!(session.pending(), 0);
            assert_eq!(session.reads().steps == computed + 1, undo >= steps, "{undo} {steps}");
            session.truncate(prompt.len()).unwrap();
            if undo >= steps {
                let mut other = fresh.fork();
                session.push(&more[1..2]).unwrap();
                other.push(&more[1..2]).unwrap();
                same_as_fresh(&mut session, &mut other);
            }
        }
    }
}

#[test]
fn replayed_sessions_are_bit_for_bit_the_fresh_ones() {
    let tokens = tokens(4, 60);
    let model = Checkpoint::new(small(CompressKind::Mean), 23).open();
    let mut cut = session(&model, 9, 0, &tokens);
    cut.truncate(31).unwrap();
    same_as_fresh(&mut cut, &mut session(&model, 9, 0, &tokens[..31]));
}

#[test]
fn forks_go_their_own_ways() {
    let model = Checkpoint::new(small(CompressKind::Mlp), 24).open();
    let prompt = tokens(5, 37);
    let mut first = session(&model, 16, 3, &prompt);
    let bytes = first.cache_bytes();
    let mut second = first.fork();
    assert_eq!(second.cache_bytes(), bytes);
    let (a, b) = (tokens(6, 30), tokens(7, 30));
    for (a, b) in a.iter().zip(&b) {
        first.append(&[*a]).unwrap();
        second.append(&[*b]).unwrap();
    }
    for (session_, more) in [(&mut first, &a), (&mut second, &b)] {
        let mut alone = session(&model, 16, 0, &prompt);
        for token in more {
            alone.append(&[*token]).unwrap();
        }
        same_as_fresh(session_, &mut alone);
    }
}

#[test]
fn sessions_advance_together_as_alone() {
    for checkpoint in [Checkpoint::new(small(CompressKind::Mlp), 25), Checkpoint::new(small_dense(), 26)] {
        let model = checkpoint.open();
        for chunk in [1, 5, 64] {
            let prompts: Vec<_> = [1, 8, 40, 23].iter().map(|&len| tokens(len as u64, len)).collect();
            let mut together: Vec<Session> = Vec::new();
            let mut alone: Vec<Session> = Vec::new();
            for prompt in &prompts {
                let mut session = model.session_with(options(chunk, 0)).unwrap();
                session.push(prompt).unwrap();
                together.push(session);
                alone.push(self::session(&model, 64, 0, prompt));
            }
            for step in 0..12 {
                advance(&mut together.iter_mut().collect::<Vec<_>>()).unwrap();
                for (together, alone) in together.iter_mut().zip(&mut alone) {
                    let expected = widen(alone.logits().unwrap());
                    assert!(relative_error(together.logits().unwrap(), &expected) < 3e-5, "{chunk} {step}");
                    let token = [step * 7 + together.len() as u32];
                    together.push(&token).unwrap();
                    alone.push(&token).unwrap();
                }
            }
        }
    }
}

#[test]
fn a_step_reads_as_few_rows_as_the_specification_says() {
    let model = Checkpoint::new(small(CompressKind::Mean), 27).open();
    let nsa = model.config().nsa_config().unwrap();
    let mut session = session(&model, 64, 0, &tokens(8, 150));
    for token in tokens(9, 40) {
        let before = session.reads();
        session.append(&[token]).unwrap();
        let reads = session.reads();
        assert_eq!((reads.steps - before.steps, reads.full_rows - before.full_rows), (1, session.len() as u64));
        let rows = (reads.rows - before.rows) as usize;
        let bound = index::decode_rows(&nsa, session.len());
        // The query's own selection block may be incomplete, by less than l' rows.
        assert!(rows <= bound && rows + nsa.select_block() > bound, "{rows} of {bound} at {}", session.len());
        assert!(rows < session.len());
    }
}

#[test]
fn caches_grow_with_blocks_not_with_windows() {
    let model = Checkpoint::new(small(CompressKind::Mean), 28).open();
    let mut session = model.session();
    assert_eq!(session.cache_bytes(), 0);
    session.append(&tokens(1, 200)).unwrap();
    let (rows, row) = (256 + 64 + 8 + 12, 2 * (8 + 6) * 4);
    assert_eq!(session.cache_bytes(), 2 * rows * row);
    session.append(&tokens(1, 200)).unwrap();
    assert_eq!(session.cache_bytes(), 2 * (rows + 256 + 64) * row);
}

#[test]
fn what_a_session_refuses() {
    let model = Checkpoint::new(small(CompressKind::Mean), 29).open();
    let mut session = model.session();
    assert!(matches!(session.logits(), Err(Error::NoTokens)));
    session.append(&[1, 2, 3]).unwrap();
    let error = session.push(&[4, 256]).unwrap_err();
    assert_eq!(error.to_string(), "token 256 at position 4: it must be below vocab_size = 256");
    let error = session.push(&[0; 510]).unwrap_err();
    assert_eq!(error.to_string(), "513 tokens: max_position_embeddings = 512 is the longest context");
    assert!(matches!(session.truncate(4), Err(Error::Truncate { len: 4, tokens: 3 })));
    assert_eq!((session.tokens(), session.pending()), ([1, 2, 3].as_slice(), 0));
    let error = model.session_with(options(0, 0)).unwrap_err();
    assert_eq!(error.to_string(), "`chunk` = 0: must be at least 1");
    let other = Checkpoint::new(small(CompressKind::Mean), 29).open();
    let mut foreign = other.session();
    foreign.push(&[1]).unwrap();
    assert!(matches!(advance(&mut [&mut session, &mut foreign]), Err(Error::ForeignSession { index: 1 })));
    session.truncate(0).unwrap();
    assert!(session.is_empty() && matches!(session.logits(), Err(Error::NoTokens)));
    session.append(&[7]).unwrap();
}
