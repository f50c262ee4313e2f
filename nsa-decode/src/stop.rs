//! Stop strings, matched across the boundaries of tokens.

use crate::{Error, Result};

/// Watches a stream of text for stop strings and holds back what may yet turn out to be the start of one.
///
/// The match that ends first in the text counts (of several that end together, the one that starts first), so the
/// result does not depend on how the text is cut into pieces.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    stops: Vec<String>,
    held: String,
}

/// What a piece of text leads to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Released {
    /// Text that is certain to belong to the output.
    pub text: String,
    /// The stop string that ended the output, by its place in the list.
    pub stop: Option<usize>,
}

impl StopMatcher {
    /// A matcher for these strings; without any, text passes at once.
    ///
    /// # Errors
    /// If one is empty.
    pub fn new(stops: Vec<String>) -> Result<Self> {
        match stops.iter().position(String::is_empty) {
            Some(index) => Err(Error::EmptyStop { index }),
            None => Ok(Self { stops, held: String::new() }),
        }
    }

    /// The stop strings.
    pub fn stops(&self) -> &[String] {
        &self.stops
    }

    /// Takes the next piece of text.
    pub fn push(&mut self, piece: &str) -> Released {
        self.held.push_str(piece);
        if let Some((start, stop)) = self.first_match() {
            self.held.truncate(start);
            return Released { text: std::mem::take(&mut self.held), stop: Some(stop) };
        }
        let keep = self.open_suffix();
        let rest = self.held.split_off(self.held.len() - keep);
        Released { text: std::mem::replace(&mut self.held, rest), stop: None }
    }

    /// The text ends here: what was held back is no stop string.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Start and stop string of the match that ends first.
    fn first_match(&self) -> Option<(usize, usize)> {
        let matches = self.stops.iter().enumerate().filter_map(|(index, stop)| {
            let start = self.held.find(stop.as_str())?;
            Some((start + stop.len(), start, index))
        });
        matches.min().map(|(_, start, index)| (start, index))
    }

    /// Length of the longest end of the held text that is the start of a stop string.
    fn open_suffix(&self) -> usize {
        let longest = self.stops.iter().map(|stop| stop.len() - 1).max().unwrap_or(0);
        let starts = self.held.char_indices().map(|(start, _)| start);
        let from = self.held.len().saturating_sub(longest);
        let open = |start: &usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[*start..]));
        starts.filter(|&start| start >= from).find(open).map_or(0, |start| self.held.len() - start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matcher(stops: &[&str]) -> StopMatcher {
        StopMatcher::new(stops.iter().map(|&stop| stop.to_owned()).collect()).unwrap()
    }

    /// Text and stop of a text pushed in pieces.
    fn run<'a>(stops: &[&str], pieces: impl IntoIterator<Item = &'a str>) -> (String, Option<usize>) {
        let mut matcher = matcher(stops);
        let mut text = String::new();
        for piece in pieces {
            let released = matcher.push(piece);
            text.push_str(&released.text);
            if released.stop.is_some() {
                return (text, released.stop);
            }
        }
        (text + &matcher.finish(), None)
    }

    #[test]
    fn text_is_held_while_it_may_be_a_stop_string() {
        let mut matcher = matcher(&["\n\nUser:"]);
        assert_eq!(matcher.push("Hi\n").text, "Hi");
        assert_eq!(matcher.push("\n").text, "");
        assert_eq!(matcher.push("Us").text, "");
        assert_eq!(matcher.push("ually").text, "\n\nUsually");
        assert_eq!(matcher.push("\n\nUser").text, "");
        assert_eq!(matcher.push(": x"), Released { text: String::new(), stop: Some(0) });
    }

    #[test]
    fn every_cut_of_the_text_gives_the_same() {
        type Case<'a> = (&'a [&'a str], &'a str, (&'a str, Option<usize>));
        let cases: &[Case<'_>] = &[
            (&["abcd", "bc"], "xabcd", ("xa", Some(1))),
            (&["bc", "abc"], "xabcd", ("x", Some(1))),
            (&["aab"], "aaaab", ("aa", Some(0))),
            (&["abab"], "abaabab!", ("aba", Some(0))),
            (&["né", "é—"], "année—", ("an", Some(0))),
            (&["—!"], "a—b—", ("a—b—", None)),
            (&[], "plain", ("plain", None)),
            (&["x"], "x", ("", Some(0))),
        ];
        for &(stops, text, (expected, stop)) in cases {
            let ends: Vec<usize> = text.char_indices().map(|(i, _)| i).skip(1).chain([text.len()]).collect();
            for mask in 0..1u32 << (ends.len() - 1) {
                let mut start = 0;
                let mut pieces = Vec::new();
                for (bit, &end) in ends.iter().enumerate() {
                    if mask >> bit & 1 == 1 || end == text.len() {
                        pieces.push(&text[start..end]);
                        start = end;
                    }
                }
                assert_eq!(run(stops, pieces.clone()), (expected.to_owned(), stop), "{stops:?} {pieces:?}");
            }
        }
    }

    #[test]
    fn an_empty_stop_string_is_an_error() {
        let error = StopMatcher::new(vec!["a".into(), String::new()]).unwrap_err();
        assert!(error.to_string().starts_with("stop string 1 is empty"), "{error}");
    }
}
