//! An opcode's modifiers, taken one by one: what is left over is not supported.

use crate::ptx::Type;

/// A base opcode and the modifiers that nobody took yet.
pub struct Opcode<'a> {
    /// What stands before the first dot.
    pub base: &'a str,
    rest: Vec<&'a str>,
}

impl<'a> Opcode<'a> {
    /// Splits an opcode.
    pub fn new(text: &'a str) -> Self {
        let mut parts = text.split('.');
        let base = parts.next().unwrap_or("");
        Self { base, rest: parts.collect() }
    }

    /// Takes a modifier.
    pub fn flag(&mut self, name: &str) -> bool {
        let at = self.rest.iter().position(|part| *part == name);
        at.map(|at| self.rest.remove(at)).is_some()
    }

    /// Takes the first modifier that is one of these.
    pub fn one_of(&mut self, names: &[&str]) -> Option<&'a str> {
        let at = self.rest.iter().position(|part| names.contains(part))?;
        Some(self.rest.remove(at))
    }

    /// Takes all modifiers that begin so.
    pub fn drop_prefixed(&mut self, prefix: &str) {
        self.rest.retain(|part| !part.starts_with(prefix));
    }

    /// Takes the first type.
    pub fn ty(&mut self) -> Option<Type> {
        let at = self.rest.iter().position(|part| Type::named(part).is_some())?;
        Type::named(self.rest.remove(at))
    }

    /// Takes the next modifier, whatever it is.
    pub fn next(&mut self) -> Option<&'a str> {
        (!self.rest.is_empty()).then(|| self.rest.remove(0))
    }

    /// The modifiers that are left.
    pub fn rest(&self) -> &[&'a str] {
        &self.rest
    }
}
