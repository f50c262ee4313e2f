//! A function's body: statements, instructions, operands.

use super::ast::{Address, Guard, Instruction, Location, Operand, Statement, Type};
use super::lex::Token;
use super::parse::Cursor;
use crate::error::At;

const MAX_DEPTH: u32 = 64;

impl<'a> Cursor<'_, 'a> {
    /// `{ statements }`
    pub fn body(&mut self) -> Result<Vec<Statement>, At> {
        let mut location = None;
        self.block(&mut location, 0)
    }

    fn block(&mut self, location: &mut Option<Location>, depth: u32) -> Result<Vec<Statement>, At> {
        if depth > MAX_DEPTH {
            return self.error("scopes nested too deeply");
        }
        self.expect('{')?;
        let mut statements = Vec::new();
        loop {
            match self.peek() {
                Some(Token::Mark('}')) => {
                    self.next()?;
                    return Ok(statements);
                }
                Some(Token::Mark('{')) => statements.push(Statement::Block(self.block(location, depth + 1)?)),
                Some(Token::Mark(';')) => {
                    self.next()?;
                }
                Some(Token::Mark('@')) => statements.push(self.instruction(*location)?),
                Some(Token::Word(word)) => self.statement(word, location, &mut statements)?,
                _ => return self.error(format!("unexpected {}", self.shown())),
            }
        }
    }

    fn statement(
        &mut self,
        word: &str,
        location: &mut Option<Location>,
        statements: &mut Vec<Statement>,
    ) -> Result<(), At> {
        match word {
            ".reg" => statements.push(self.registers()?),
            ".loc" => *location = Some(self.location()?),
            ".file" => {
                self.file()?;
            }
            ".pragma" => self.pragma()?,
            ".shared" | ".shared::cta" | ".local" | ".param" | ".global" | ".const" => {
                statements.extend(self.variables(false)?.into_iter().map(Statement::Variable));
            }
            ".extern" => {
                self.next()?;
                statements.extend(self.variables(true)?.into_iter().map(Statement::Variable));
            }
            _ if word.starts_with('.') => return self.error(format!("`{word}` is not supported here")),
            _ if self.peek_second() == Some(Token::Mark(':')) => {
                let name = self.word()?.to_owned();
                self.expect(':')?;
                statements.extend(self.labelled(name)?);
            }
            _ => statements.push(self.instruction(*location)?),
        }
        Ok(())
    }

    /// What a label names: a place, a list of branch targets, or the prototype of a call.
    fn labelled(&mut self, name: String) -> Result<Option<Statement>, At> {
        if self.eat_word(".branchtargets") {
            let mut targets = vec![self.word()?.to_owned()];
            while self.eat(',') {
                targets.push(self.word()?.to_owned());
            }
            self.expect(';')?;
            return Ok(Some(Statement::Targets(name, targets)));
        }
        if self.eat_word(".callprototype") || self.eat_word(".calltargets") {
            return self.error("indirect calls are not supported");
        }
        Ok(Some(Statement::Label(name)))
    }

    fn location(&mut self) -> Result<Location, At> {
        self.next()?;
        let (file, line) = (self.int()? as u32, self.int()? as u32);
        self.int()?;
        if self.eat(',') {
            // `function_name label, inlined_at file line column`: where the code was inlined.
            while self.next()? != Token::Word("inlined_at") {}
            for _ in 0..3 {
                self.int()?;
            }
        }
        Ok(Location { file, line })
    }

    fn registers(&mut self) -> Result<Statement, At> {
        self.next()?;
        let word = self.word()?;
        let Some(ty) = word.strip_prefix('.').and_then(Type::named) else {
            return self.error(format!("`{word}` is no type of a register"));
        };
        let mut names = Vec::new();
        loop {
            let name = self.word()?.to_owned();
            let mut count = None;
            if self.eat('<') {
                let number = self.int()?;
                if number > 1 << 20 {
                    return self.error("too many registers");
                }
                count = Some(number as u32);
                self.expect('>')?;
            }
            names.push((name, count));
            if !self.eat(',') {
                break;
            }
        }
        self.expect(';')?;
        Ok(Statement::Registers(ty, names))
    }

    fn instruction(&mut self, location: Option<Location>) -> Result<Statement, At> {
        let line = self.line();
        let mut guard = None;
        if self.eat('@') {
            let negated = self.eat('!');
            guard = Some(Guard { register: self.word()?.to_owned(), negated });
        }
        let opcode = self.word()?.to_owned();
        let mut operands = Vec::new();
        if !self.eat(';') {
            loop {
                operands.push(self.operand(0)?);
                if self.eat(';') {
                    break;
                }
                self.expect(',')?;
            }
        }
        Ok(Statement::Instruction(Box::new(Instruction { line, location, guard, opcode, operands })))
    }

    fn operand(&mut self, depth: u32) -> Result<Operand, At> {
        if depth > 4 {
            return self.error("operands nested too deeply");
        }
        let first = self.simple_operand(depth)?;
        if self.eat('|') {
            return Ok(Operand::Pair(Box::new(first), Box::new(self.simple_operand(depth)?)));
        }
        Ok(first)
    }

    fn simple_operand(&mut self, depth: u32) -> Result<Operand, At> {
        match self.next()? {
            Token::Word(word) => {
                let name = word.to_owned();
                Ok(Operand::Name(name, self.offset()?))
            }
            Token::Int(value) => Ok(Operand::Int(value as i64)),
            Token::F32(bits) => Ok(Operand::F32(bits)),
            Token::F64(bits) => Ok(Operand::F64(bits)),
            Token::Mark('-') => match self.next()? {
                Token::Int(value) => Ok(Operand::Int((value as i64).wrapping_neg())),
                Token::F32(bits) => Ok(Operand::F32(bits ^ 1 << 31)),
                Token::F64(bits) => Ok(Operand::F64(bits ^ 1 << 63)),
                _ => self.error("expected a number after `-`"),
            },
            Token::Mark('!') => Ok(Operand::Not(self.word()?.to_owned())),
            Token::Mark('{') => Ok(Operand::Vector(self.operands('}', depth)?)),
            Token::Mark('(') => Ok(Operand::List(self.operands(')', depth)?)),
            Token::Mark('[') => self.address(depth),
            _ => self.error("not an operand"),
        }
    }

    /// Operands up to a closing mark.
    fn operands(&mut self, end: char, depth: u32) -> Result<Vec<Operand>, At> {
        let mut found = Vec::new();
        while !self.eat(end) {
            found.push(self.operand(depth + 1)?);
            if !self.eat(',') {
                self.expect(end)?;
                break;
            }
        }
        Ok(found)
    }

    /// What stands behind `[`.
    fn address(&mut self, depth: u32) -> Result<Operand, At> {
        let (mut base, mut offset) = (None, 0);
        match self.peek() {
            Some(Token::Word(word)) => {
                self.next()?;
                base = Some(word.to_owned());
                offset = self.offset()?;
            }
            _ => offset += self.signed()?,
        }
        let mut coordinates = None;
        if self.eat(',') {
            self.expect('{')?;
            coordinates = Some(self.operands('}', depth)?);
        }
        self.expect(']')?;
        Ok(Operand::Address(Address { base, offset, coordinates }))
    }
}
