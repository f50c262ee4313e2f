//! Tokenizers: bytes, byte-level BPE, byte fallback, words; whole and as a stream.

use nsa_core::model::{ModelConfig, TokenizerKind};
use nsa_core::tokenizer::{TOKENIZER_FILE, Tokenizer, TokenizerError};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::path::Path;

/// Everything that a stream gives for `ids`, one part a token and the rest.
fn streamed(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
    let mut stream = tokenizer.stream();
    let mut parts: Vec<String> = ids.iter().map(|&id| stream.push(id).expect("a known id")).collect();
    parts.push(stream.finish().expect("known ids"));
    parts
}

fn written(folder: &Path, tokenizer: &Value) -> Tokenizer {
    let path = folder.join(TOKENIZER_FILE);
    std::fs::write(&path, tokenizer.to_string()).expect("writes");
    Tokenizer::open(&path).expect("a tokenizer")
}

/// The characters that byte-level tokenizers write bytes as: printable Latin-1 stands for itself, the rest follows from
/// 256.
fn byte_chars() -> Vec<char> {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut next = 256;
    (0..=255u8)
        .map(|b| {
            if printable(b) {
                return char::from(b);
            }
            next += 1;
            char::from_u32(next - 1).expect("a letter of the Latin extensions")
        })
        .collect()
}

/// A byte-level BPE: ids 0..256 are the bytes, then come merges, one of them with half a character in it, and a special
/// token.
fn byte_level() -> Value {
    let chars = byte_chars();
    let token = |bytes: &[u8]| bytes.iter().map(|&b| chars[b as usize]).collect::<String>();
    let mut vocab: serde_json::Map<String, Value> =
        chars.iter().enumerate().map(|(id, c)| (c.to_string(), json!(id))).collect();
    let merges: [(&[u8], &[u8]); 6] =
        [(b"t", b"h"), (b"th", b"e"), (b" ", b"the"), (b"e", b"r"), (b"a", &[0xC3]), (&[0xE2], &[0x82])];
    let mut pairs = Vec::new();
    for (id, (left, right)) in merges.into_iter().enumerate() {
        vocab.insert(token(&[left, right].concat()), json!(256 + id));
        pairs.push(json!([token(left), token(right)]));
    }
    json!({
        "version": "1.0",
        "truncation": { "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0 },
        "padding": { "strategy": { "Fixed": 8 }, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
                     "pad_type_id": 0, "pad_token": "!" },
        "added_tokens": [{ "id": 262, "content": "<|end|>", "single_word": false, "lstrip": false, "rstrip": false,
                           "normalized": false, "special": true }],
        "normalizer": null,
        "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
        "post_processor": null,
        "decoder": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
        "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                   "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                   "vocab": vocab, "merges": pairs }
    })
}

/// In the manner of SentencePiece: words that start with ▁, and bytes as `<0x..>` for what has no token.
fn byte_fallback() -> Value {
    let mut vocab = serde_json::Map::new();
    vocab.insert("<unk>".to_owned(), json!(0));
    for b in 0..256 {
        vocab.insert(format!("<0x{b:02X}>"), json!(1 + b));
    }
    for (id, token) in ["▁", "a", "b", "▁a", "ab", ""].into_iter().enumerate() {
        vocab.insert(token.to_owned(), json!(257 + id));
    }
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "pre_tokenizer": null,
        "post_processor": null,
        "normalizer": { "type": "Sequence", "normalizers": [
            { "type": "Prepend", "prepend": "▁" },
            { "type": "Replace", "pattern": { "String": " " }, "content": "▁" } ] },
        "decoder": { "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "▁" }, "content": " " },
            { "type": "ByteFallback" }, { "type": "Fuse" },
            { "type": "Strip", "content": " ", "start": 1, "stop": 0 } ] },
        "model": { "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                   "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
                   "vocab": vocab, "merges": [["▁", "a"], ["a", "b"]] }
    })
}

/// Words without a token for unknown ones, and with a gap in the ids.
fn words() -> Value {
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": { "type": "Whitespace" }, "post_processor": null, "decoder": null,
        "model": { "type": "WordLevel", "vocab": { "one": 0, "two": 1, "three": 7 }, "unk_token": "[UNK]" }
    })
}

#[test]
fn bytes_hold_back_characters_and_replace_what_is_ill_formed() {
    let tokenizer = Tokenizer::bytes();
    assert_eq!((tokenizer.vocab_size(), tokenizer.kind(), tokenizer.path()), (256, TokenizerKind::Bytes, None));
    let ids = tokenizer.encode("a€").expect("bytes");
    assert_eq!(streamed(&tokenizer, &ids), ["a", "", "", "€", ""]);
    // 0xE2 0x82 waits for a third byte; `A` makes it certain that none comes. 0xFF can start nothing.
    assert_eq!(streamed(&tokenizer, &[0xE2, 0x82, 65, 0xFF, 0xC3]), ["", "", "\u{FFFD}A", "\u{FFFD}", "", "\u{FFFD}"]);
    let error = tokenizer.decode(&[65, 256]).expect_err("no byte");
    assert_eq!(error.to_string(), "bytes: no token has id 256; there are 256 ids");
    let mut stream = tokenizer.stream();
    assert_eq!(stream.push(0xC3).expect("a byte"), "");
    assert!(stream.push(256).is_err());
    assert_eq!(stream.push(0xA9).expect("a byte"), "é", "an error leaves the stream as it was");
}

#[test]
fn a_file_tokenizes_without_its_truncation_and_padding() {
    let folder = tempfile::tempdir().expect("a folder");
    let tokenizer = written(folder.path(), &byte_level());
    assert_eq!((tokenizer.vocab_size(), tokenizer.kind()), (263, TokenizerKind::File));
    let ids = tokenizer.encode("the other aé<|end|>").expect("bytes");
    // the | Ġ o the r | Ġ aÃ © | end: longer than the file's truncation, merged across the middle of é.
    assert_eq!(ids, [257, 32, 111, 257, 114, 32, 260, 0xA9, 262]);
    assert_eq!(tokenizer.decode(&ids).expect("known ids"), "the other aé<|end|>");
    assert_eq!(tokenizer.encode("x").expect("bytes").len(), 1, "not padded");
    assert_eq!(streamed(&tokenizer, &ids), ["the", " ", "o", "the", "r", " ", "", "aé", "<|end|>", ""]);
    let error = tokenizer.decode(&[257, 263]).expect_err("beyond").to_string();
    assert!(error.ends_with("tokenizer.json: no token has id 263; there are 263 ids"), "{error}");
    let mut stream = tokenizer.stream();
    assert_eq!(stream.push(260).expect("known"), "");
    assert!(stream.push(263).is_err());
    assert_eq!(stream.push(0xA9).expect("known"), "aé", "an error leaves the stream as it was");
}

#[test]
fn added_tokens_that_would_be_renumbered_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut tokenizer = byte_level();
    tokenizer["added_tokens"][0]["id"] = json!(300);
    let path = folder.path().join(TOKENIZER_FILE);
    std::fs::write(&path, tokenizer.to_string()).expect("writes");
    let error = Tokenizer::open(&path).expect_err("a gap").to_string();
    assert!(error.contains("added token `<|end|>` has id 300, which does not follow"), "{error}");
}

#[test]
fn byte_fallback_streams_like_it_decodes() {
    let folder = tempfile::tempdir().expect("a folder");
    let tokenizer = written(folder.path(), &byte_fallback());
    for text in ["ab", "a ab  b", "é", "a😀é b😀", " a"] {
        let ids = tokenizer.encode(text).expect("bytes stand in");
        assert_eq!(tokenizer.decode(&ids).expect("known ids"), text);
        assert_eq!(streamed(&tokenizer, &ids).concat(), text);
    }
    // A token without text is no start of a text, where a space would go.
    assert_eq!(streamed(&tokenizer, &[258, 262, 260]), ["a", "", " a", ""]);
    // The run C3 A9 C3 as a whole reads as three replacement characters; é was out by then.
    assert_eq!(streamed(&tokenizer, &[1 + 0xC3, 1 + 0xA9, 1 + 0xC3, 258]), ["", "é", "", "\u{FFFD}a", ""]);
}

#[test]
fn words_are_joined_and_unknown_ones_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let tokenizer = written(folder.path(), &words());
    assert_eq!(tokenizer.vocab_size(), 8);
    assert_eq!(tokenizer.encode("one three two").expect("known words"), [0, 7, 1]);
    assert_eq!(streamed(&tokenizer, &[0, 7, 1]), ["one", " three", " two", ""]);
    let error = tokenizer.decode(&[0, 4]).expect_err("a gap").to_string();
    assert!(error.ends_with("no token has id 4; there are 8 ids"), "{error}");
    let error = tokenizer.encode("four").expect_err("no such word");
    assert!(matches!(&error, TokenizerError::Refused { .. }) && error.to_string().contains(TOKENIZER_FILE), "{error}");
}

#[test]
fn a_stream_does_not_wait_for_ever() {
    let folder = tempfile::tempdir().expect("a folder");
    let tokenizer = written(folder.path(), &byte_level());
    let ids = vec![0x80; 200];
    let parts = streamed(&tokenizer, &ids);
    assert_eq!(parts.concat(), tokenizer.decode(&ids).expect("known ids"));
    assert!(parts[..40].iter().any(|part| !part.is_empty()), "held back for ever");
}

#[test]
fn a_model_names_its_tokenizer() {
    let folder = tempfile::tempdir().expect("a folder");
    let bytes = ModelConfig::preset("tiny-1m").expect("a preset");
    assert_eq!(Tokenizer::for_model(&bytes, folder.path()).expect("bytes").vocab_size(), 256);
    let with_vocab = |vocab_size| {
        let mut fields = bytes.to_fields();
        fields.tokenizer = TokenizerKind::File;
        fields.vocab_size = vocab_size;
        ModelConfig::new(fields).expect("valid")
    };
    let missing = Tokenizer::for_model(&with_vocab(263), folder.path()).expect_err("no file").to_string();
    assert!(missing.contains(TOKENIZER_FILE) && missing.contains("cannot be read"), "{missing}");
    written(folder.path(), &byte_level());
    assert_eq!(Tokenizer::for_model(&with_vocab(263), folder.path()).expect("fits").vocab_size(), 263);
    let small = Tokenizer::for_model(&with_vocab(262), folder.path()).expect_err("too small").to_string();
    assert!(small.ends_with("tokenizer.json: 263 ids, but the model's config field `vocab_size` is 262"), "{small}");
    std::fs::write(folder.path().join(TOKENIZER_FILE), "{\"version\": \"1.0\"").expect("writes");
    let broken = Tokenizer::for_model(&with_vocab(263), folder.path()).expect_err("no JSON").to_string();
    assert!(broken.contains("tokenizer.json: not a tokenizer: "), "{broken}");
}

proptest! {
    #[test]
    fn byte_streams_add_up_to_the_text(bytes in prop::collection::vec(
        prop_oneof![any::<u8>(), prop::sample::select(&[0xE2, 0x82, 0xF0, 0x9F, 0x98, 0xAC, 0xED][..])], 0..60,
    )) {
        let tokenizer = Tokenizer::bytes();
        let ids: Vec<u32> = bytes.iter().map(|&b| u32::from(b)).collect();
        prop_assert_eq!(streamed(&tokenizer, &ids).concat(), String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn text_survives_bytes(text in ".*") {
        let tokenizer = Tokenizer::bytes();
        let ids = tokenizer.encode(&text).expect("bytes");
        prop_assert_eq!(&tokenizer.decode(&ids).expect("bytes"), &text);
        let replaced = streamed(&tokenizer, &ids).concat().matches(char::REPLACEMENT_CHARACTER).count();
        prop_assert_eq!(replaced, text.matches(char::REPLACEMENT_CHARACTER).count());
    }
}

#[test]
fn file_streams_add_up_to_the_text() {
    let folder = tempfile::tempdir().expect("a folder");
    let (level, fallback) = (byte_level(), byte_fallback());
    let level = written(folder.path(), &level);
    let fallback = written(folder.path(), &fallback);
    let ids = prop::collection::vec(prop_oneof![0u32..262, Just(0xE2u32), Just(0x82), Just(0xAC), Just(262)], 0..40);
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    runner
        .run(&(ids, "[ab é€😀]{0,20}"), |(ids, text)| {
            prop_assert_eq!(streamed(&level, &ids).concat(), level.decode(&ids).expect("known ids"));
            for tokenizer in [&level, &fallback] {
                let ids = tokenizer.encode(&text).expect("bytes");
                prop_assert_eq!(&tokenizer.decode(&ids).expect("known ids"), &text);
                prop_assert_eq!(streamed(tokenizer, &ids).concat(), text.as_str());
            }
            Ok(())
        })
        .expect("streams add up");
}
