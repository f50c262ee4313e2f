//! Text from a model, token by token: one sequence or a batch.

use crate::sample::{Sampler, Sampling};
use crate::session::advance;
use crate::stop::StopMatcher;
use crate::{Error, Model, Result, Session};
use nsa_core::tokenizer::DecodeStream;

/// How text is generated.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    /// Tokens to generate at most.
    pub max_tokens: usize,
    /// How each is drawn.
    pub sampling: Sampling,
    /// Strings that end the text; they are not part of it.
    pub stop: Vec<String>,
}

impl Default for GenerateOptions {
    /// At most 256 tokens from the model's own distribution, without stop strings.
    fn default() -> Self {
        Self { max_tokens: 256, sampling: Sampling::default(), stop: Vec::new() }
    }
}

/// Why a text ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model drew the token that ends a text.
    EndOfText,
    /// A stop string came.
    Stop(String),
    /// There are as many tokens as wanted.
    MaxTokens,
    /// The longest context is full, and the token after it was drawn.
    ContextFull,
}

impl std::fmt::Display for Finish {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::EndOfText => f.write_str("end of text"),
            Self::Stop(string) => write!(f, "stop string {string:?}"),
            Self::MaxTokens => f.write_str("as many tokens as wanted"),
            Self::ContextFull => f.write_str("the longest context is full"),
        }
    }
}

/// One step of a generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The token drawn.
    pub token: u32,
    /// Text that has become certain: whole characters, and nothing that may yet turn out to be part of a stop string.
    pub text: String,
    /// Set on the last piece.
    pub finish: Option<Finish>,
}

/// What draws a sequence's tokens and turns them to text.
#[derive(Debug)]
struct Stream<'m> {
    model: &'m Model,
    sampler: Sampler,
    stops: StopMatcher,
    /// `None` once the text has ended.
    decoder: Option<DecodeStream<'m>>,
    left: usize,
}

impl<'m> Stream<'m> {
    fn new(model: &'m Model, session: &Session, options: GenerateOptions, number: u64) -> Result<Self> {
        if !session.model().same_as(model) {
            return Err(Error::ForeignSession { index: number as usize });
        }
        if session.is_empty() {
            return Err(Error::NoTokens);
        }
        let sampler = Sampler::new(options.sampling, number)?;
        let stops = StopMatcher::new(options.stop)?;
        let decoder = (options.max_tokens > 0).then(|| model.tokenizer().stream());
        Ok(Self { model, sampler, stops, decoder, left: options.max_tokens })
    }

    fn is_finished(&self) -> bool {
        self.decoder.is_none()
    }

    /// Draws the next token and adds it to the session, to be computed when the one after it is drawn. The logits of a full
    /// context give a token too, the last: nothing is computed from it, so that it needs no place.
    fn draw(&mut self, session: &mut Session) -> Result<Piece> {
        session.logits()?;
        let token = session.draw(&mut self.sampler)?;
        let full = session.len() == self.model.config().max_position_embeddings();
        if !full {
            session.push(&[token])?;
        }
        self.left -= 1;
        if self.model.config().eos_token_id() == Some(token) {
            return self.close(token, String::new(), Finish::EndOfText);
        }
        let decoder = self.decoder.as_mut().expect("a finished stream draws nothing");
        let released = self.stops.push(&decoder.push(token)?);
        if let Some(stop) = released.stop {
            self.decoder = None;
            let finish = Some(Finish::Stop(self.stops.stops()[stop].clone()));
            return Ok(Piece { token, text: released.text, finish });
        }
        if self.left == 0 {
            return self.close(token, released.text, Finish::MaxTokens);
        }
        if full {
            return self.close(token, released.text, Finish::ContextFull);
        }
        Ok(Piece { token, text: released.text, finish: None })
    }

    /// Ends the text: what was held back comes out.
    fn close(&mut self, token: u32, mut text: String, finish: Finish) -> Result<Piece> {
        let rest = self.decoder.take().map_or(Ok(String::new()), DecodeStream::finish)?;
        let released = self.stops.push(&rest);
        text.push_str(&released.text);
        let finish = match released.stop {
            Some(stop) => Finish::Stop(self.stops.stops()[stop].clone()),
            None => finish,
        };
        if released.stop.is_none() {
            text.push_str(&self.stops.finish());
        }
        Ok(Piece { token, text, finish: Some(finish) })
    }
}

/// An iterator over the pieces of one text. The session has the tokens drawn, and can be used on afterwards; only the token
/// drawn after a full context is not in it.
///
/// ```no_run
/// use nsa_decode::{Backend, GenerateOptions, Model};
/// let model = Model::open("checkpoint", Backend::pick(None)?.0)?;
/// let mut session = model.session();
/// session.push(&model.encode_prompt("Once upon a time")?)?;
/// for piece in model.generate(&mut session, GenerateOptions::default())? {
///     print!("{}", piece?.text);
/// }
/// # Ok::<(), nsa_decode::Error>(())
/// ```
#[derive(Debug)]
pub struct Generate<'a> {
    session: &'a mut Session,
    stream: Stream<'a>,
}

impl Iterator for Generate<'_> {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.stream.is_finished() {
            return None;
        }
        let piece = self.stream.draw(self.session);
        if piece.is_err() {
            self.stream.decoder = None;
        }
        Some(piece)
    }
}

impl Model {
    /// Generates text after the tokens of `session`.
    ///
    /// # Errors
    /// If the session is empty or of another model, or an option breaks its rule.
    pub fn generate<'a>(&'a self, session: &'a mut Session, options: GenerateOptions) -> Result<Generate<'a>> {
        let stream = Stream::new(self, session, options, 0)?;
        Ok(Generate { session, stream })
    }
}

/// Sequences that are generated together: each step reads the weights once for all. They may start with prompts of
/// different lengths, end at different times and be joined by others at any time.
#[derive(Debug)]
pub struct Batch<'m> {
    model: &'m Model,
    members: Vec<(Session, Stream<'m>)>,
    /// Of a member whose token could not be drawn while others' were.
    failed: Option<Error>,
}

impl<'m> Batch<'m> {
    /// No sequence yet.
    pub fn new(model: &'m Model) -> Self {
        Self { model, members: Vec::new(), failed: None }
    }

    /// Adds a sequence; returns its number. Sequences with the same seed draw from different streams of it, by their
    /// numbers.
    ///
    /// # Errors
    /// Those of [`Model::generate`].
    pub fn add(&mut self, session: Session, options: GenerateOptions) -> Result<usize> {
        let number = self.members.len();
        let stream = Stream::new(self.model, &session, options, number as u64)?;
        self.members.push((session, stream));
        Ok(number)
    }

    /// The sequences' sessions, by number.
    pub fn sessions(&self) -> impl Iterator<Item = &Session> {
        self.members.iter().map(|(session, _)| session)
    }

    /// The sessions, to go on with.
    pub fn into_sessions(self) -> Vec<Session> {
        self.members.into_iter().map(|(session, _)| session).collect()
    }

    /// Computes what is pending, without drawing: prompts, before the clock of decoding starts.
    ///
    /// # Errors
    /// If an operation refuses.
    pub fn advance(&mut self) -> Result<()> {
        let mut sessions: Vec<&mut Session> =
            self.members.iter_mut().filter(|(_, stream)| !stream.is_finished()).map(|(session, _)| session).collect();
        match sessions.is_empty() {
            true => Ok(()),
            false => advance(&mut sessions),
        }
    }

    /// Draws one token of each unfinished sequence; returns the pieces with the sequences' numbers, none if all are
    /// finished.
    ///
    /// # Errors
    /// If an operation refuses, or logits have no distribution: that ends their sequence, and is said after what was drawn of the
    /// others, by the next step.
    pub fn step(&mut self) -> Result<Vec<(usize, Piece)>> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        self.advance()?;
        let mut pieces = Vec::new();
        for (number, (session, stream)) in self.members.iter_mut().enumerate() {
            if stream.is_finished() {
                continue;
            }
            match stream.draw(session) {
                Ok(piece) => pieces.push((number, piece)),
                Err(error) => {
                    stream.decoder = None;
                    self.failed.get_or_insert(error);
                }
            }
        }
        match self.failed.take_if(|_| pieces.is_empty()) {
            Some(error) => Err(error),
            None => Ok(pieces),
        }
    }
}
