//! A module's directives, variables and functions.

use super::ast::{Function, Init, Kind, Module, Parameter, Space, Type, Variable};
use super::lex::{Placed, Token};
use crate::error::At;
use std::collections::BTreeMap;

/// The newest version of PTX, times ten.
const MAX_VERSION: u32 = 99;

/// A place in the tokens.
pub struct Cursor<'t, 'a> {
    tokens: &'t [Placed<'a>],
    at: usize,
}

/// Parses all tokens of a source.
pub fn module(tokens: &[Placed<'_>]) -> Result<Module, At> {
    let mut cursor = Cursor { tokens, at: 0 };
    let mut module = Module {
        version: (0, 0),
        target: String::new(),
        variables: Vec::new(),
        functions: Vec::new(),
        files: BTreeMap::new(),
    };
    while let Some(token) = cursor.peek() {
        cursor.top_level(token, &mut module)?;
    }
    if module.version == (0, 0) || module.target.is_empty() {
        return Err(At::new(cursor.line(), "a module needs .version and .target"));
    }
    Ok(module)
}

impl<'a> Cursor<'_, 'a> {
    /// The next token.
    pub fn peek(&self) -> Option<Token<'a>> {
        self.tokens.get(self.at).map(|token| token.0)
    }

    /// The token after the next one.
    pub fn peek_second(&self) -> Option<Token<'a>> {
        self.tokens.get(self.at + 1).map(|token| token.0)
    }

    /// The line of the next token, or of the last.
    pub fn line(&self) -> u32 {
        self.tokens.get(self.at).or(self.tokens.last()).map_or(1, |token| token.1)
    }

    /// An error here.
    pub fn error<T>(&self, what: impl Into<String>) -> Result<T, At> {
        Err(At::new(self.line(), what))
    }

    /// Takes the next token.
    pub fn next(&mut self) -> Result<Token<'a>, At> {
        match self.peek() {
            Some(token) => {
                self.at += 1;
                Ok(token)
            }
            None => self.error("the text ends in the middle of a statement"),
        }
    }

    /// Takes a mark if it is next.
    pub fn eat(&mut self, mark: char) -> bool {
        let found = self.peek() == Some(Token::Mark(mark));
        self.at += usize::from(found);
        found
    }

    /// Takes a mark.
    pub fn expect(&mut self, mark: char) -> Result<(), At> {
        if self.eat(mark) { Ok(()) } else { self.error(format!("expected `{mark}`, found {}", self.shown())) }
    }

    /// Takes a word if it is this one.
    pub fn eat_word(&mut self, word: &str) -> bool {
        let found = matches!(self.peek(), Some(Token::Word(found)) if found == word);
        self.at += usize::from(found);
        found
    }

    /// Takes a word.
    pub fn word(&mut self) -> Result<&'a str, At> {
        match self.peek() {
            Some(Token::Word(word)) => {
                self.at += 1;
                Ok(word)
            }
            _ => self.error(format!("expected a name, found {}", self.shown())),
        }
    }

    /// Takes a number that is not negative.
    pub fn int(&mut self) -> Result<u64, At> {
        match self.peek() {
            Some(Token::Int(value)) => {
                self.at += 1;
                Ok(value)
            }
            _ => self.error(format!("expected an integer, found {}", self.shown())),
        }
    }

    /// Takes a number with a sign.
    pub fn signed(&mut self) -> Result<i64, At> {
        let negative = self.eat('-');
        let value = self.int()? as i64;
        Ok(if negative { value.wrapping_neg() } else { value })
    }

    /// How an error shows the next token.
    pub fn shown(&self) -> String {
        match self.peek() {
            Some(Token::Word(word)) => format!("`{word}`"),
            Some(Token::Mark(mark)) => format!("`{mark}`"),
            Some(Token::Int(value)) => format!("`{value}`"),
            Some(Token::Text(text)) => format!("\"{text}\""),
            Some(Token::F32(_) | Token::F64(_)) => "a number".into(),
            None => "the end".into(),
        }
    }

    fn top_level(&mut self, token: Token<'a>, module: &mut Module) -> Result<(), At> {
        let Token::Word(word) = token else { return self.error(format!("unexpected {}", self.shown())) };
        match word {
            ".version" => {
                self.at += 1;
                module.version = self.version()?;
            }
            ".target" => {
                self.at += 1;
                module.target = self.word()?.to_owned();
                while self.eat(',') {
                    self.word()?;
                }
            }
            ".address_size" => {
                self.at += 1;
                if self.int()? != 64 {
                    return self.error("only .address_size 64 is supported");
                }
            }
            ".file" => {
                let (number, name) = self.file()?;
                module.files.insert(number, name);
            }
            ".section" => self.section()?,
            ".pragma" => self.pragma()?,
            _ => self.declaration(module)?,
        }
        Ok(())
    }

    fn version(&mut self) -> Result<(u32, u32), At> {
        let Token::F64(bits) = self.next()? else { return self.error("expected a version such as 8.0") };
        let tenths = (f64::from_bits(bits) * 10.0).round() as u32;
        if !(70..=MAX_VERSION).contains(&tenths) {
            return self.error(format!("PTX version {}.{} is not supported: 7.0 to 9.9 are", tenths / 10, tenths % 10));
        }
        Ok((tenths / 10, tenths % 10))
    }

    /// `.file number "name"`, with an optional time and size.
    pub fn file(&mut self) -> Result<(u32, String), At> {
        self.at += 1;
        let number = self.int()? as u32;
        let Token::Text(name) = self.next()? else { return self.error("expected a file name") };
        while self.eat(',') {
            self.int()?;
        }
        Ok((number, name.to_owned()))
    }

    /// `.pragma "text";`
    pub fn pragma(&mut self) -> Result<(), At> {
        self.at += 1;
        let Token::Text(_) = self.next()? else { return self.error("expected a text after .pragma") };
        while self.eat(',') {
            self.next()?;
        }
        self.expect(';')
    }

    /// Debug information: no part of what a module does.
    fn section(&mut self) -> Result<(), At> {
        self.at += 1;
        self.word()?;
        self.expect('{')?;
        while !self.eat('}') {
            self.next()?;
        }
        Ok(())
    }

    fn declaration(&mut self, module: &mut Module) -> Result<(), At> {
        let mut external = false;
        loop {
            let Some(Token::Word(word)) = self.peek() else {
                return self.error(format!("unexpected {}", self.shown()));
            };
            match word {
                ".visible" | ".weak" | ".common" => self.at += 1,
                ".extern" => {
                    external = true;
                    self.at += 1;
                }
                ".entry" | ".func" => {
                    module.functions.push(self.function(word == ".entry")?);
                    return Ok(());
                }
                ".alias" => return self.error(".alias is not supported"),
                _ => {
                    module.variables.extend(self.variables(external)?);
                    return Ok(());
                }
            }
        }
    }

    /// Variables of one declaration, up to the `;`.
    pub fn variables(&mut self, external: bool) -> Result<Vec<Variable>, At> {
        let space = match self.word()? {
            ".global" => Space::Global,
            ".shared" | ".shared::cta" => Space::Shared,
            ".local" => Space::Local,
            ".const" => Space::Const,
            ".param" => Space::Param,
            other => {
                self.at -= 1;
                return self.error(format!("`{other}` is not supported here"));
            }
        };
        let (ty, lanes, align) = self.variable_type()?;
        let element = ty.bytes() * lanes;
        let mut found = Vec::new();
        loop {
            let name = self.word()?.to_owned();
            let count = self.array()?;
            let mut init = Vec::new();
            if self.eat('=') {
                self.initialiser(ty, &mut init, 0)?;
            }
            let elements = match count {
                Some(0) if !init.is_empty() => init.len() as u64,
                Some(count) => count,
                None => 1,
            };
            let bytes = elements.checked_mul(u64::from(element)).filter(|bytes| *bytes <= 1 << 32);
            let Some(bytes) = bytes else { return self.error(format!("`{name}` is too large")) };
            if init.len() as u64 * u64::from(ty.bytes()) > bytes {
                return self.error(format!("more first values than `{name}` has elements"));
            }
            let align = align.unwrap_or(u64::from(element));
            found.push(Variable { name, space, align, bytes, element: ty.bytes(), init, external });
            if !self.eat(',') {
                break;
            }
        }
        self.expect(';')?;
        Ok(found)
    }

    /// Type, vector length and alignment of a variable, in any order.
    fn variable_type(&mut self) -> Result<(Type, u32, Option<u64>), At> {
        let (mut align, mut lanes) = (None, 1);
        loop {
            let word = self.word()?;
            match word {
                ".align" => {
                    let bytes = self.int()?;
                    if !bytes.is_power_of_two() {
                        return self.error("an alignment is a power of two");
                    }
                    align = Some(bytes);
                }
                ".v2" => lanes = 2,
                ".v4" => lanes = 4,
                ".attribute" => {
                    self.expect('(')?;
                    while !self.eat(')') {
                        self.next()?;
                    }
                }
                _ => match word.strip_prefix('.').and_then(Type::named) {
                    Some(ty) if ty.kind != Kind::Predicate => {
                        self.pointer_attributes()?;
                        return Ok((ty, lanes, align));
                    }
                    _ => {
                        self.at -= 1;
                        return self.error(format!("`{word}` is no type of a variable"));
                    }
                },
            }
        }
    }

    /// `.ptr .global .align 16` behind a parameter's type: says what it points to.
    fn pointer_attributes(&mut self) -> Result<(), At> {
        if self.eat_word(".ptr") {
            for space in [".const", ".global", ".local", ".shared"] {
                self.eat_word(space);
            }
            if self.eat_word(".align") {
                self.int()?;
            }
        }
        Ok(())
    }

    /// `[a][b]`: the number of elements, 0 where it is open.
    fn array(&mut self) -> Result<Option<u64>, At> {
        let mut count = None;
        while self.eat('[') {
            let length = if self.peek() == Some(Token::Mark(']')) { 0 } else { self.int()? };
            self.expect(']')?;
            let Some(product) = count.unwrap_or(1u64).checked_mul(length) else {
                return self.error("an array that is too large");
            };
            count = Some(product);
        }
        Ok(count)
    }

    fn initialiser(&mut self, ty: Type, out: &mut Vec<Init>, depth: u32) -> Result<(), At> {
        if depth > 8 {
            return self.error("first values nested too deeply");
        }
        if self.eat('{') {
            while !self.eat('}') {
                self.initialiser(ty, out, depth + 1)?;
                if !self.eat(',') {
                    self.expect('}')?;
                    break;
                }
            }
            return Ok(());
        }
        let negative = self.eat('-');
        let value = match self.next()? {
            Token::Int(value) if negative => Init::Bits((value as i64).wrapping_neg() as u64),
            Token::Int(value) => Init::Bits(value),
            Token::F32(bits) if ty.bits == 32 => Init::Bits(u64::from(bits)),
            Token::F64(bits) => {
                let value = if negative { -f64::from_bits(bits) } else { f64::from_bits(bits) };
                Init::Bits(if ty.bits == 32 { u64::from((value as f32).to_bits()) } else { value.to_bits() })
            }
            Token::Word("generic") => {
                self.expect('(')?;
                let name = self.word()?.to_owned();
                self.expect(')')?;
                let offset = self.offset()?;
                Init::Address(name, offset, true)
            }
            Token::Word(name) => {
                let offset = self.offset()?;
                Init::Address(name.to_owned(), offset, false)
            }
            _ => {
                self.at -= 1;
                return self.error(format!("{} is no first value of this type", self.shown()));
            }
        };
        out.push(value);
        Ok(())
    }

    /// `+4`, `-4` or nothing.
    pub fn offset(&mut self) -> Result<i64, At> {
        let signed = self.eat('+') || self.peek() == Some(Token::Mark('-'));
        if signed { self.signed() } else { Ok(0) }
    }

    fn function(&mut self, entry: bool) -> Result<Function, At> {
        let line = self.line();
        self.at += 1;
        let returns = if !entry && self.peek() == Some(Token::Mark('(')) { self.parameters()? } else { Vec::new() };
        let name = self.word()?.to_owned();
        let params = if self.peek() == Some(Token::Mark('(')) { self.parameters()? } else { Vec::new() };
        let mut function = Function {
            name,
            entry,
            line,
            params,
            returns,
            body: None,
            max_threads: None,
            required_threads: None,
            cluster: None,
        };
        loop {
            match self.peek() {
                Some(Token::Mark('{')) => {
                    function.body = Some(self.body()?);
                    return Ok(function);
                }
                Some(Token::Mark(';')) => {
                    self.at += 1;
                    return Ok(function);
                }
                Some(Token::Word(word)) => self.function_attribute(word, &mut function)?,
                _ => return self.error(format!("expected a body, found {}", self.shown())),
            }
        }
    }

    fn function_attribute(&mut self, word: &str, function: &mut Function) -> Result<(), At> {
        self.at += 1;
        match word {
            ".maxntid" => {
                let [x, y, z] = self.triple()?;
                function.max_threads = Some(x.saturating_mul(y).saturating_mul(z));
            }
            ".reqntid" => function.required_threads = Some(self.triple()?),
            ".reqnctapercluster" => {
                let [x, y, z] = self.triple()?;
                function.cluster = Some(x.saturating_mul(y).saturating_mul(z));
            }
            ".minnctapersm" | ".maxnreg" | ".maxnctapersm" | ".maxclusterrank" => {
                self.int()?;
            }
            ".noreturn" | ".explicitcluster" | ".blocksareclusters" => {}
            ".attribute" => {
                self.expect('(')?;
                while !self.eat(')') {
                    self.next()?;
                }
            }
            ".pragma" => {
                self.at -= 1;
                self.pragma()?;
            }
            other => {
                self.at -= 1;
                return self.error(format!("`{other}` is not supported here"));
            }
        }
        Ok(())
    }

    fn triple(&mut self) -> Result<[u32; 3], At> {
        let mut sizes = [1; 3];
        for (i, size) in sizes.iter_mut().enumerate() {
            if i > 0 && !self.eat(',') {
                break;
            }
            *size = u32::try_from(self.int()?).or_else(|_| self.error("a size that is too large"))?;
        }
        Ok(sizes)
    }

    /// `(.param .u64 a, .reg .b32 b)`
    pub fn parameters(&mut self) -> Result<Vec<Parameter>, At> {
        self.expect('(')?;
        let mut found = Vec::new();
        while !self.eat(')') {
            let register = match self.word()? {
                ".param" => false,
                ".reg" => true,
                other => return self.error(format!("`{other}` begins no parameter")),
            };
            let (ty, lanes, align) = self.variable_type()?;
            let name = self.word()?.to_owned();
            let count = self.array()?.unwrap_or(1);
            let element = u64::from(ty.bytes() * lanes);
            let Some(bytes) = count.checked_mul(element).filter(|bytes| *bytes <= 1 << 20) else {
                return self.error(format!("parameter `{name}` is too large"));
            };
            let align = align.unwrap_or(element);
            found.push(Parameter { name, bytes, align, register: register.then_some(ty) });
            if !self.eat(',') {
                self.expect(')')?;
                break;
            }
        }
        Ok(found)
    }
}
