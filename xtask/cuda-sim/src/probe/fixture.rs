//! A device's answers in a file.

use super::Case;
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use std::io::{Read, Write};
use std::path::Path;
use thiserror::Error;

/// What begins a file.
const MAGIC: &[u8] = b"cuda-probe 2\n";

/// What a device said to one case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The case.
    pub name: String,
    /// A hash of the case's PTX and input: an answer to another question is stale.
    pub question: u64,
    /// The driver's code: 0 where the kernel ran to its end.
    pub code: u32,
    /// A hash of what it wrote.
    pub digest: u64,
    /// What it wrote; empty where the hash is enough.
    pub output: Vec<u8>,
}

impl Answer {
    /// An answer with all of its output.
    pub fn new(name: &str, question: u64, code: u32, output: Vec<u8>) -> Self {
        Self { name: name.to_owned(), question, code, digest: hash(&output), output }
    }

    /// Whether an output is the one of this answer.
    pub fn is(&self, output: &[u8]) -> bool {
        self.digest == hash(output)
    }
}

/// The answers of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fixture {
    /// Device, capability, driver version, as lines of text.
    pub device: String,
    /// Answers.
    pub answers: Vec<Answer>,
}

/// A file that is no fixture.
#[derive(Debug, Error)]
pub enum FixtureError {
    /// Reading or writing failed.
    #[error("fixture: {0}")]
    Io(#[from] std::io::Error),
    /// The file holds something else.
    #[error("fixture: {0} is wrong")]
    Format(&'static str),
}

impl Case {
    /// A hash of what is asked.
    pub fn question(&self) -> u64 {
        let parts = [self.ptx.as_bytes(), &self.input, format!("{:?}", self.map).as_bytes()].concat();
        hash(&parts)
    }
}

/// FNV-1a.
fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

impl Fixture {
    /// The answer to a case, where it is one to this very question.
    pub fn answer(&self, case: &Case) -> Option<&Answer> {
        self.answers.iter().find(|answer| answer.name == case.name && answer.question == case.question())
    }

    /// Writes a compressed file.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), FixtureError> {
        let mut out = GzEncoder::new(std::fs::File::create(path)?, Compression::best());
        out.write_all(MAGIC)?;
        text(&mut out, &self.device)?;
        out.write_all(&(self.answers.len() as u32).to_le_bytes())?;
        for answer in &self.answers {
            text(&mut out, &answer.name)?;
            out.write_all(&answer.question.to_le_bytes())?;
            out.write_all(&answer.code.to_le_bytes())?;
            out.write_all(&answer.digest.to_le_bytes())?;
            out.write_all(&(answer.output.len() as u32).to_le_bytes())?;
            out.write_all(&answer.output)?;
        }
        out.finish()?;
        Ok(())
    }

    /// Reads a file.
    ///
    /// # Errors
    /// The file cannot be read or is no fixture.
    pub fn read(path: &Path) -> Result<Self, FixtureError> {
        let mut data = Vec::new();
        GzDecoder::new(std::fs::File::open(path)?).read_to_end(&mut data)?;
        let mut rest = data.strip_prefix(MAGIC).ok_or(FixtureError::Format("its beginning"))?;
        let device = take_text(&mut rest)?;
        let count = take_u32(&mut rest)?;
        let mut answers = Vec::new();
        for _ in 0..count {
            let name = take_text(&mut rest)?;
            let question = take_u64(&mut rest)?;
            let code = take_u32(&mut rest)?;
            let digest = take_u64(&mut rest)?;
            let length = take_u32(&mut rest)? as usize;
            let output = take(&mut rest, length)?.to_vec();
            answers.push(Answer { name, question, code, digest, output });
        }
        Ok(Self { device, answers })
    }
}

fn text(out: &mut impl Write, text: &str) -> std::io::Result<()> {
    out.write_all(&(text.len() as u32).to_le_bytes())?;
    out.write_all(text.as_bytes())
}

fn take<'d>(rest: &mut &'d [u8], count: usize) -> Result<&'d [u8], FixtureError> {
    let (head, tail) = rest.split_at_checked(count).ok_or(FixtureError::Format("its length"))?;
    *rest = tail;
    Ok(head)
}

fn take_u32(rest: &mut &[u8]) -> Result<u32, FixtureError> {
    let bytes = take(rest, 4)?;
    Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

fn take_u64(rest: &mut &[u8]) -> Result<u64, FixtureError> {
    Ok(u64::from(take_u32(rest)?) | u64::from(take_u32(rest)?) << 32)
}

fn take_text(rest: &mut &[u8]) -> Result<String, FixtureError> {
    let length = take_u32(rest)? as usize;
    String::from_utf8(take(rest, length)?.to_vec()).map_err(|_| FixtureError::Format("a text"))
}
