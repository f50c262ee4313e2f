//! Texts: what is drawn, when it ends, alone and in batches.

use crate::kit::{Checkpoint, small};
use nsa_core::CompressKind;
use nsa_core::model::ModelFields;
use nsa_decode::{Batch, Error, Finish, GenerateOptions, Model, Piece, Sampling};

fn options(max_tokens: usize) -> GenerateOptions {
    GenerateOptions { max_tokens, sampling: Sampling { seed: 5, ..Sampling::default() }, stop: Vec::new() }
}

fn run(model: &Model, prompt: &str, options: GenerateOptions) -> Vec<Piece> {
    let mut session = model.session();
    session.push(&model.encode_prompt(prompt).unwrap()).unwrap();
    model.generate(&mut session, options).unwrap().map(Result::unwrap).collect()
}

fn text(pieces: &[Piece]) -> String {
    pieces.iter().map(|piece| piece.text.as_str()).collect()
}

#[test]
fn the_session_has_the_tokens_drawn() {
    let model = Checkpoint::new(small(CompressKind::Mlp), 40).open();
    let mut session = model.session();
    session.push(&model.encode_prompt("Once").unwrap()).unwrap();
    let pieces: Vec<Piece> = model.generate(&mut session, options(30)).unwrap().map(Result::unwrap).collect();
    let tokens: Vec<u32> = pieces.iter().map(|piece| piece.token).collect();
    assert_eq!((pieces.len(), session.len()), (30, 34));
    assert_eq!(session.tokens()[4..], tokens);
    assert_eq!(text(&pieces), model.tokenizer().decode(&tokens).unwrap());
    assert!(pieces[..29].iter().all(|piece| piece.finish.is_none()));
    assert_eq!(pieces[29].finish, Some(Finish::MaxTokens));
    // The same seed gives the same text; and the next texts goes on where this ended.
    assert_eq!(run(&model, "Once", options(30)), pieces);
    let more: Vec<Piece> = model.generate(&mut session, options(5)).unwrap().map(Result::unwrap).collect();
    assert_eq!((more.len(), session.len()), (5, 39));
}

#[test]
fn greedy_is_the_likeliest_token_each_time() {
    let model = Checkpoint::new(small(CompressKind::Mean), 41).open();
    let greedy = GenerateOptions { sampling: Sampling::greedy(), ..options(20) };
    let mut session = model.session();
    session.push(&[3, 1, 4]).unwrap();
    for piece in run(&model, "\u{3}\u{1}\u{4}", greedy) {
        let logits = session.logits().unwrap();
        let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]).then(b.cmp(&a))).unwrap();
        assert_eq!(piece.token, best as u32);
        session.push(&[piece.token]).unwrap();
    }
}

#[test]
fn texts_end_for_every_reason() {
    let checkpoint = Checkpoint::new(small(CompressKind::Mean), 42);
    let model = checkpoint.open();
    let whole = run(&model, "ab", options(60));
    let decoded = text(&whole);
    // A stop string from the middle of that text, several tokens long.
    let at = decoded.char_indices().map(|(i, _)| i).nth(20).unwrap();
    let stop: String = decoded[at..].chars().take(3).collect();
    let end = decoded.find(&stop).unwrap();
    let stopped = run(&model, "ab", GenerateOptions { stop: vec!["never comes".into(), stop.clone()], ..options(60) });
    assert_eq!(text(&stopped), decoded[..end]);
    assert_eq!(stopped.last().unwrap().finish, Some(Finish::Stop(stop)));
    // The token that ends a text, and the longest context.
    let last = whole[11].token;
    let first = whole.iter().position(|piece| piece.token == last).unwrap();
    let fields = ModelFields { eos_token_id: Some(last), ..checkpoint.config.to_fields() };
    let ended = run(&rewritten(&checkpoint, fields), "ab", options(60));
    assert_eq!((ended.len(), ended.last().unwrap().finish.clone()), (first + 1, Some(Finish::EndOfText)));
    assert_eq!(
        text(&ended),
        model.tokenizer().decode(&whole[..first].iter().map(|p| p.token).collect::<Vec<_>>()).unwrap()
    );
    let fields = ModelFields { max_position_embeddings: 20, ..checkpoint.config.to_fields() };
    let full = run(&rewritten(&checkpoint, fields), "ab", options(60));
    // Two tokens of the prompt and 18 fill the context; its last logits give one more.
    assert_eq!((full.len(), full.last().unwrap().finish.clone()), (19, Some(Finish::ContextFull)));
    assert!(full[..18].iter().all(|piece| piece.finish.is_none()));
    assert_eq!(
        text(&full),
        model.tokenizer().decode(&whole[..19].iter().map(|p| p.token).collect::<Vec<_>>()).unwrap()
    );
    assert!(run(&model, "ab", options(0)).is_empty());
}

#[test]
fn a_full_context_gives_one_more_token() {
    let model = Checkpoint::new(small(CompressKind::Mean), 48).open();
    let mut session = model.session();
    session.push(&[1; 512]).unwrap();
    let likeliest = Sampling::greedy();
    for (max_tokens, finish) in [(1, Finish::MaxTokens), (9, Finish::ContextFull)] {
        let options = GenerateOptions { sampling: likeliest.clone(), ..options(max_tokens) };
        let pieces: Vec<Piece> = model.generate(&mut session, options).unwrap().map(Result::unwrap).collect();
        let logits = session.logits().unwrap();
        let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]).then(b.cmp(&a))).unwrap();
        assert_eq!((pieces.len(), pieces[0].token, pieces[0].finish.clone()), (1, best as u32, Some(finish)));
        assert_eq!(session.len(), 512, "there is no place for it in the session");
    }
    // In a batch beside a sequence that goes on.
    let mut batch = Batch::new(&model);
    let mut short = model.session();
    short.push(&[1, 2]).unwrap();
    batch.add(session, options(3)).unwrap();
    batch.add(short, options(3)).unwrap();
    let counts: Vec<usize> = (0..4).map(|_| batch.step().unwrap().len()).collect();
    assert_eq!(counts, [2, 1, 1, 0]);
}

/// The same weights under another configuration.
fn rewritten(checkpoint: &Checkpoint, fields: ModelFields) -> Model {
    let other = Checkpoint::new(fields, 0);
    std::fs::copy(checkpoint.path().join("model.safetensors"), other.path().join("model.safetensors")).unwrap();
    other.open()
}

#[test]
fn a_batch_gives_the_texts_of_its_members() {
    let model = Checkpoint::new(small(CompressKind::Mlp), 43).open();
    let prompts = ["a", "a longer prompt, of more than one block and one window", "three"];
    let greedy = |max_tokens| GenerateOptions { sampling: Sampling::greedy(), ..options(max_tokens) };
    let lengths = [9, 25, 16];
    let mut batch = Batch::new(&model);
    for (prompt, length) in prompts.iter().zip(lengths) {
        let mut session = model.session();
        session.push(&model.encode_prompt(prompt).unwrap()).unwrap();
        batch.add(session, greedy(length)).unwrap();
    }
    let mut pieces = vec![Vec::new(); 3];
    let mut steps = 0;
    loop {
        let step = batch.step().unwrap();
        if step.is_empty() {
            break;
        }
        steps += 1;
        step.into_iter().for_each(|(number, piece)| pieces[number].push(piece));
    }
    assert_eq!(steps, 25);
    for ((prompt, length), pieces) in prompts.iter().zip(lengths).zip(&pieces) {
        assert_eq!(run(&model, prompt, greedy(length)), *pieces);
    }
    assert!(batch.step().unwrap().is_empty());
    let sessions = batch.into_sessions();
    assert_eq!(sessions.iter().map(|s| s.len()).collect::<Vec<_>>(), [10, prompts[1].len() + 25, 21]);
}

#[test]
fn members_of_a_batch_draw_from_streams_of_their_own() {
    let model = Checkpoint::new(small(CompressKind::Mean), 44).open();
    let mut batch = Batch::new(&model);
    for _ in 0..3 {
        let mut session = model.session();
        session.push(&[10, 20]).unwrap();
        batch.add(session, options(12)).unwrap();
    }
    while !batch.step().unwrap().is_empty() {}
    let sessions = batch.into_sessions();
    assert_ne!(sessions[0].tokens(), sessions[1].tokens());
    assert_ne!(sessions[1].tokens(), sessions[2].tokens());
}

#[test]
fn prompts_start_with_the_starting_token_once() {
    let fields = ModelFields { bos_token_id: Some(7), ..small(CompressKind::Mean) };
    let model = Checkpoint::new(fields, 45).open();
    assert_eq!(model.encode_prompt("ab").unwrap(), [7, 97, 98]);
    assert_eq!(model.encode_prompt("\u{7}b").unwrap(), [7, 98]);
    assert_eq!(model.encode_prompt("").unwrap(), [7]);
}

#[test]
fn what_a_generation_refuses() {
    let model = Checkpoint::new(small(CompressKind::Mean), 46).open();
    let mut session = model.session();
    assert!(matches!(model.generate(&mut session, options(1)), Err(Error::NoTokens)));
    session.push(&[1; 3]).unwrap();
    let bad = GenerateOptions { sampling: Sampling { top_k: Some(0), ..Sampling::default() }, ..options(1) };
    let message = model.generate(&mut session, bad).unwrap_err().to_string();
    assert_eq!(message, "sampling parameter `top_k` = 0: must be at least 1");
    let bad = GenerateOptions { stop: vec![String::new()], ..options(1) };
    assert!(matches!(model.generate(&mut session, bad), Err(Error::EmptyStop { index: 0 })));
    let other = Checkpoint::new(small(CompressKind::Mean), 46).open();
    assert!(matches!(other.generate(&mut session, options(1)), Err(Error::ForeignSession { .. })));
}

#[test]
fn logits_that_are_no_numbers_end_the_text_with_an_error() {
    let mut checkpoint = Checkpoint::new(small(CompressKind::Mean), 47);
    checkpoint.tensors.get_mut("model.norm.weight").unwrap().data[3] = f64::NAN;
    checkpoint.write();
    let model = checkpoint.open();
    let mut session = model.session();
    session.push(&[1, 2]).unwrap();
    let results: Vec<_> = model.generate(&mut session, options(5)).unwrap().collect();
    assert_eq!(results.len(), 1);
    let message = results[0].as_ref().unwrap_err().to_string();
    assert_eq!(message, "logit of token 0 is NaN: no distribution to draw from");
}

/// A sequence whose logits are no numbers ends with an error, after what the others drew; these go on.
#[test]
fn a_sequence_that_fails_takes_nothing_from_the_others() {
    let fields = ModelFields { tie_word_embeddings: false, ..small(CompressKind::Mean) };
    let mut checkpoint = Checkpoint::new(fields, 49);
    let greedy = || GenerateOptions { sampling: Sampling::greedy(), ..options(6) };
    let alone = run(&checkpoint.open(), "ab", greedy());
    // One that does not come up there.
    let spoiled = (b'c'..=b'z').find(|&byte| alone.iter().all(|piece| piece.token != u32::from(byte))).unwrap();
    let width = checkpoint.config.hidden_size();
    let embedding = checkpoint.tensors.get_mut("model.embed_tokens.weight").unwrap();
    embedding.data[usize::from(spoiled) * width..][..width].fill(f64::NAN);
    checkpoint.write();
    let model = checkpoint.open();
    let mut batch = Batch::new(&model);
    for prompt in [*b"ab", [spoiled; 2]] {
        let mut session = model.session();
        session.push(&prompt.map(u32::from)).unwrap();
        batch.add(session, greedy()).unwrap();
    }
    let mut pieces = batch.step().unwrap();
    assert_eq!(pieces.len(), 1);
    let error = batch.step().unwrap_err().to_string();
    assert!(error.contains("NaN"), "{error}");
    loop {
        let more = batch.step().unwrap();
        if more.is_empty() {
            break;
        }
        pieces.extend(more);
    }
    assert!(pieces.iter().all(|(number, _)| *number == 0));
    assert_eq!(text(&pieces.into_iter().map(|(_, piece)| piece).collect::<Vec<_>>()), text(&alone));
}
