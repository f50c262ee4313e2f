//! Corpus, splits, sampler.

use crate::kit;
use nsa_core::tokenizer::Tokenizer;
use nsa_train::Error;
use nsa_train::data::{Corpus, Sampler, Section, Split, Text, TextOptions, split, unescape};
use nsa_train::model::Batch;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const NONE: u32 = u32::MAX;

fn open(folder: &Path, files: &[PathBuf], separator: Option<&str>) -> nsa_train::Result<Corpus> {
    let options = TextOptions { separator: separator.map(str::to_owned), ..TextOptions::default() };
    Corpus::open(files, &Tokenizer::bytes(), &options, &folder.join("cache"))
}

fn write(folder: &Path, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, text).unwrap();
    path
}

fn document(corpus: &Corpus, document: usize) -> String {
    let mut tokens = Vec::new();
    corpus.copy_tokens(corpus.document(document), &mut tokens);
    Tokenizer::bytes().decode(&tokens).unwrap()
}

fn documents(corpus: &Corpus) -> Vec<String> {
    (0..corpus.num_documents()).map(|i| document(corpus, i)).collect()
}

#[test]
fn files_and_separators_make_documents() {
    let folder = tempfile::tempdir().unwrap();
    let files = [write(folder.path(), "a", "one\x0ctwo\x0c\x0c"), write(folder.path(), "b", "né")];
    let whole = open(folder.path(), &files, None).unwrap();
    assert_eq!(documents(&whole), ["one\x0ctwo\x0c\x0c", "né"]);
    let divided = open(folder.path(), &files, Some("\x0c")).unwrap();
    assert_eq!(documents(&divided), ["one", "two", "né"]);
    assert_eq!(divided.document_bytes(2), 3);
    assert_ne!(whole.hash(), divided.hash());
    assert_eq!(unescape(r"a\f\\\n").unwrap(), "a\x0c\\\n");
    assert!(unescape(r"\x").is_err() && unescape("\\").is_err());
}

#[test]
fn beginnings_and_ends_are_tokens_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let files = [write(folder.path(), "a", "xy"), write(folder.path(), "b", "z")];
    let options = TextOptions { bos: Some(2), eos: Some(3), ..TextOptions::default() };
    let corpus = Corpus::open(&files, &Tokenizer::bytes(), &options, folder.path()).unwrap();
    let mut tokens = Vec::new();
    corpus.copy_tokens(0..corpus.num_tokens(), &mut tokens);
    assert_eq!(tokens, [2, 120, 121, 3, 2, 122, 3]);
    assert_eq!((corpus.document_bytes(0), corpus.document_bytes(1)), (2, 1));
}

#[test]
fn text_is_tokenised_once_and_again_when_it_changes() {
    let folder = tempfile::tempdir().unwrap();
    let files = [write(folder.path(), "a", "some text")];
    let first = open(folder.path(), &files, None).unwrap();
    let time = fs::metadata(first.path()).unwrap().modified().unwrap();
    let again = open(folder.path(), &files, None).unwrap();
    assert_eq!((first.hash(), time), (again.hash(), fs::metadata(again.path()).unwrap().modified().unwrap()));
    write(folder.path(), "a", "some Text");
    let changed = open(folder.path(), &files, None).unwrap();
    assert_ne!(first.hash(), changed.hash());
    assert_eq!(documents(&changed), ["some Text"]);
    assert_eq!(documents(&first), ["some text"]);
    let unfinished = fs::read_dir(folder.path().join("cache")).unwrap().count();
    assert_eq!(unfinished, 2, "nothing but the two corpora");
}

#[test]
fn a_damaged_cache_is_an_error_that_names_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let files = [write(folder.path(), "a", "some text")];
    let corpus = open(folder.path(), &files, None).unwrap();
    let path = corpus.path().to_owned();
    drop(corpus);
    fs::write(&path, "short").unwrap();
    let error = open(folder.path(), &files, None).unwrap_err().to_string();
    assert!(error.contains("tokens.bin") && error.contains("5 bytes, expected 9"), "{error}");
    fs::write(path.with_file_name("index.json"), "{").unwrap();
    let error = open(folder.path(), &files, None).unwrap_err().to_string();
    assert!(error.contains("index.json"), "{error}");
}

#[test]
fn text_that_cannot_be_used_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let bad = write(folder.path(), "bad", b"abc\xff");
    let error = open(folder.path(), &[bad], None).unwrap_err().to_string();
    assert!(error.contains("bad") && error.contains("byte 3"), "{error}");
    let empty = write(folder.path(), "empty", "");
    assert!(matches!(open(folder.path(), &[empty], None), Err(Error::Value { name: "data", .. })));
    assert!(matches!(open(folder.path(), &[folder.path().join("missing")], None), Err(Error::File(_))));
    let file = write(folder.path(), "a", "x");
    assert!(matches!(open(folder.path(), &[file], Some("")), Err(Error::Value { .. })));
}

#[test]
fn splits_cover_the_text_without_overlap() {
    let folder = tempfile::tempdir().unwrap();
    let corpus = open(folder.path(), &kit::write_texts(folder.path()), None).unwrap();
    let total = corpus.num_tokens();
    for how in [Split::Auto, Split::Documents, Split::Offset] {
        let (train, validation) = split(&corpus, how, 0.3, 5).unwrap();
        let validation = validation.unwrap();
        let mut seen = vec![0; total as usize];
        for part in train.parts().iter().chain(validation.parts()) {
            part.tokens.clone().for_each(|token| seen[token as usize] += 1);
        }
        assert!(seen.iter().all(|&n| n == 1));
        assert!(validation.num_tokens() as f64 >= 0.3 * total as f64 - 0.5);
        assert_eq!(train.num_bytes() + validation.num_bytes(), total);
        if how == Split::Offset {
            assert_eq!(validation.num_tokens(), (0.3 * total as f64).round() as u64);
        } else {
            assert_eq!(train.parts().len() + validation.parts().len(), corpus.num_documents());
        }
    }
    let different = (0..8).any(|seed| {
        split(&corpus, Split::Documents, 0.1, seed).unwrap() != split(&corpus, Split::Documents, 0.1, 5).unwrap()
    });
    assert!(different, "the seed chooses");
    assert_eq!(split(&corpus, Split::Auto, 0.0, 0).unwrap(), (Section::whole(&corpus), None));
    assert!(split(&corpus, Split::Auto, 1.0, 0).is_err());
    let one = open(folder.path(), &kit::write_texts(folder.path())[..1], None).unwrap();
    assert!(split(&one, Split::Documents, 0.1, 0).is_err(), "nothing is left to train on");
    assert_eq!(
        split(&one, Split::Auto, 0.5, 0).unwrap().0.num_tokens(),
        one.num_tokens() - one.num_tokens().div_ceil(2)
    );
}

/// A corpus whose tokens say where they are: document d is a run of `2·d`, `2·d + 1`, … within one byte each.
fn marked(folder: &Path, lengths: &[usize]) -> Text {
    let files: Vec<PathBuf> = lengths
        .iter()
        .enumerate()
        .map(|(d, &len)| {
            let bytes: Vec<u8> = (0..len).map(|i| (d * 24 + i) as u8).collect();
            write(folder, &format!("m{d}"), bytes)
        })
        .collect();
    Text::whole(Arc::new(open(folder, &files, None).unwrap()))
}

#[test]
fn an_epoch_draws_every_token_about_once_and_never_crosses_documents() {
    let folder = tempfile::tempdir().unwrap();
    let lengths = [20, 7, 1, 24, 13];
    let total: usize = lengths.iter().sum();
    for context in [1, 5, 8, total] {
        let mut sampler = Sampler::new(marked(folder.path(), &lengths), context, 3).unwrap();
        let epoch = sampler.sequences_per_epoch();
        assert_eq!(epoch as usize, total / context);
        for first in [0, epoch, 7 * epoch] {
            let mut batch = Batch::default();
            sampler.fill(first, epoch as usize, &mut batch).unwrap();
            check_batch(&batch, &lengths);
            let mut count = HashMap::new();
            batch.tokens().iter().for_each(|&token| *count.entry(token).or_insert(0) += 1);
            assert!(count.values().all(|&n| n == 1), "a token is drawn once an epoch");
            assert_eq!(count.len(), epoch as usize * context);
        }
    }
}

/// Every sequence lies in one document, and targets are the next tokens of that document.
fn check_batch(batch: &Batch, lengths: &[usize]) {
    for seq in batch.packing().seqs() {
        let tokens = &batch.tokens()[seq.rows.clone()];
        let targets = &batch.targets()[seq.rows.clone()];
        assert!(!tokens.is_empty());
        for (i, (&token, &target)) in tokens.iter().zip(targets).enumerate() {
            assert_eq!(token, tokens[0] + i as u32);
            assert_eq!(token / 24, tokens[0] / 24, "one document");
            let last = token as usize % 24 + 1 == lengths[token as usize / 24];
            assert_eq!(target, if last { NONE } else { token + 1 });
        }
    }
}

#[test]
fn the_position_is_one_number() {
    let folder = tempfile::tempdir().unwrap();
    let new = |seed| Sampler::new(marked(folder.path(), &[20, 7, 24, 13]), 6, seed).unwrap();
    let draw = |sampler: &mut Sampler, position, count| {
        let mut batch = Batch::default();
        sampler.fill(position, count, &mut batch).unwrap();
        (batch.tokens().to_vec(), batch.targets().to_vec(), batch.packing().clone())
    };
    let (mut one, mut two) = (new(9), new(9));
    let all = draw(&mut one, 0, 40);
    // Jumping there, in other portions, from another epoch.
    draw(&mut two, 33, 2);
    let mut tokens = draw(&mut two, 0, 13).0;
    tokens.extend(draw(&mut two, 13, 27).0);
    assert_eq!(all.0, tokens);
    assert_eq!(draw(&mut one, 17, 5), draw(&mut two, 17, 5));
    assert_ne!(all.0, draw(&mut new(10), 0, 40).0, "the seed counts");
    let epoch = one.sequences_per_epoch();
    assert_ne!(draw(&mut one, 0, 5).0, draw(&mut one, epoch, 5).0, "epochs differ");
    assert!(Sampler::new(marked(folder.path(), &[20]), 21, 0).is_err(), "too short");
}
