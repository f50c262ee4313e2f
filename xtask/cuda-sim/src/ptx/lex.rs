//! Characters to tokens.

use crate::error::At;

/// A piece of PTX text.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Token<'a> {
    /// An opcode with its modifiers, a name, a register or a directive: `ld.global.v4.u32`, `%r1`, `.reg`.
    Word(&'a str),
    /// An integer; negative numbers are a `-` and a number.
    Int(u64),
    /// A number of type f32 (`0f3F800000`), as its bits.
    F32(u32),
    /// A number of type f64 (`0d…` or a decimal), as its bits.
    F64(u64),
    /// A text in quotes, without them.
    Text(&'a str),
    /// Anything else, one character.
    Mark(char),
}

/// A token and the line it is on, from 1.
pub type Placed<'a> = (Token<'a>, u32);

fn word_part(c: u8) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, b'_' | b'$' | b'%' | b'.')
}

/// Splits a source into tokens, without comments.
pub fn tokens(source: &str) -> Result<Vec<Placed<'_>>, At> {
    let bytes = source.as_bytes();
    let (mut at, mut line, mut out) = (0, 1u32, Vec::with_capacity(source.len() / 4));
    while at < bytes.len() {
        let start = at;
        match bytes[at] {
            b'\n' => {
                line += 1;
                at += 1;
            }
            c if c.is_ascii_whitespace() || c == 0 => at += 1,
            b'/' if bytes.get(at + 1) == Some(&b'/') => {
                at += bytes[at..].iter().position(|&c| c == b'\n').unwrap_or(bytes.len() - at);
            }
            b'/' if bytes.get(at + 1) == Some(&b'*') => {
                let Some(end) = source[at + 2..].find("*/") else {
                    return Err(At::new(line, "comment without an end"));
                };
                let end = at + 2 + end + 2;
                line += bytes[at..end].iter().filter(|&&c| c == b'\n').count() as u32;
                at = end;
            }
            b'"' => {
                let Some(end) = source[at + 1..].find(['"', '\n']) else {
                    return Err(At::new(line, "text without an end"));
                };
                if bytes[at + 1 + end] == b'\n' {
                    return Err(At::new(line, "text without an end"));
                }
                out.push((Token::Text(&source[at + 1..at + 1 + end]), line));
                at += end + 2;
            }
            c if c.is_ascii_digit() => {
                at += bytes[at..].iter().position(|&c| !word_part(c)).unwrap_or(bytes.len() - at);
                // The exponent's sign of a decimal: 1.0e-5.
                let decimal = source[start..at].contains('.') || !source[start..at].starts_with("0x");
                if decimal && !source[start..at].starts_with("0f") && !source[start..at].starts_with("0d") {
                    let exponent = matches!(bytes[at - 1], b'e' | b'E') && matches!(bytes.get(at), Some(b'-' | b'+'));
                    if exponent {
                        at += 1;
                        at += bytes[at..].iter().position(|c| !c.is_ascii_digit()).unwrap_or(bytes.len() - at);
                    }
                }
                out.push((number(&source[start..at], line)?, line));
            }
            c if word_part(c) => {
                at = word_end(bytes, at);
                // Directives and types may follow each other without a space: `.reg.b32`.
                if c == b'.' {
                    at = bytes[start + 1..at].iter().position(|&c| c == b'.').map_or(at, |dot| start + 1 + dot);
                }
                out.push((Token::Word(&source[start..at]), line));
            }
            c if c.is_ascii() => {
                out.push((Token::Mark(c as char), line));
                at += 1;
            }
            _ => return Err(At::new(line, "a character that is not ASCII")),
        }
    }
    Ok(out)
}

/// Where the word that starts here ends; `::` belongs to a word, `:` does not.
fn word_end(bytes: &[u8], mut at: usize) -> usize {
    while at < bytes.len() {
        if word_part(bytes[at]) {
            at += 1;
        } else if bytes[at] == b':'
            && bytes.get(at + 1) == Some(&b':')
            && bytes.get(at + 2).is_some_and(|c| c.is_ascii_alphanumeric())
        {
            at += 2;
        } else {
            break;
        }
    }
    at
}

fn number(text: &str, line: u32) -> Result<Token<'static>, At> {
    let bad = || At::new(line, format!("`{text}` is not a number"));
    if let Some(bits) = text.strip_prefix("0f").or(text.strip_prefix("0F")) {
        return u32::from_str_radix(bits, 16).map(Token::F32).map_err(|_| bad());
    }
    if let Some(bits) = text.strip_prefix("0d").or(text.strip_prefix("0D")) {
        return u64::from_str_radix(bits, 16).map(Token::F64).map_err(|_| bad());
    }
    let digits = text.strip_suffix('U').unwrap_or(text);
    if let Some(hex) = digits.strip_prefix("0x").or(digits.strip_prefix("0X")) {
        return u64::from_str_radix(hex, 16).map(Token::Int).map_err(|_| bad());
    }
    if let Some(binary) = digits.strip_prefix("0b").or(digits.strip_prefix("0B")) {
        return u64::from_str_radix(binary, 2).map(Token::Int).map_err(|_| bad());
    }
    if digits.contains(['.', 'e', 'E']) {
        return digits.parse::<f64>().map(|value| Token::F64(value.to_bits())).map_err(|_| bad());
    }
    let octal = digits.len() > 1 && digits.starts_with('0');
    u64::from_str_radix(digits, if octal { 8 } else { 10 }).map(Token::Int).map_err(|_| bad())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directives_and_types_need_no_space_and_opcodes_stay_whole() {
        let words = |source: &'static str| -> Vec<&str> {
            let words = tokens(source).expect("PTX").into_iter();
            words.filter_map(|(token, _)| if let Token::Word(word) = token { Some(word) } else { None }).collect()
        };
        assert_eq!(words(".reg.b32 %r1;"), [".reg", ".b32", "%r1"]);
        assert_eq!(words(".shared.align 8 .b8 s;"), [".shared", ".align", ".b8", "s"]);
        assert_eq!(words("ld.global.L1::no_allocate.v4.u32"), ["ld.global.L1::no_allocate.v4.u32"]);
        assert_eq!(words(".shared::cta .b8 s[4];"), [".shared::cta", ".b8", "s"]);
    }
}
