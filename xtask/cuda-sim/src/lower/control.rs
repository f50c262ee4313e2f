//! Branches, calls, ends.

use super::opcode::Opcode;
use super::scope::Binding;
use super::{Lower, MAX_INLINE, class_of};
use crate::code::{Op, SystemCall};
use crate::error::At;
use crate::exec::regs::{Class, alu};
use crate::ptx::{Function, Instruction, Kind, Operand, Parameter, Type};

const U32: Type = Type { kind: Kind::Unsigned, bits: 32 };

impl<'m> Lower<'m> {
    /// What changes the way of control.
    pub(super) fn control(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        o.flag("uni");
        match o.base {
            "bra" => {
                self.arity(i, 1..=1)?;
                let target = self.label(&i.operands[0])?;
                self.emit(Op::Branch(target), &[], &[])
            }
            "brx" => self.branch_index(o, i),
            "call" => self.call(i),
            "ret" => match self.stack.last().and_then(|frame| frame.1) {
                Some(label) => self.emit(Op::Branch(label as u32), &[], &[]),
                None => self.emit(Op::Exit, &[], &[]),
            },
            "exit" => self.emit(Op::Exit, &[], &[]),
            "trap" | "brkpt" => self.emit(Op::Trap, &[], &[]),
            "nanosleep" => {
                o.ty();
                self.emit(Op::Yield, &[], &[])
            }
            "setmaxnreg" => {
                // Registers are not bounded here; the assembler checks the counts.
                let change = o.one_of(&["inc", "dec"]);
                if change.is_none() || !o.flag("sync") || !o.flag("aligned") || o.ty() != Some(U32) {
                    return self.unsupported(i);
                }
                self.emit(Op::Nothing, &[], &[])
            }
            _ => {
                self.arity(i, 1..=1)?;
                self.emit(Op::Nothing, &[], &[])
            }
        }
    }

    fn label(&self, operand: &Operand) -> Result<u32, At> {
        let Operand::Name(name, 0) = operand else { return self.fail("expected a label") };
        match self.scopes.find(name) {
            Some(Binding::Label(label)) => Ok(*label as u32),
            _ => self.fail(format!("`{name}` is no label")),
        }
    }

    fn branch_index(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        self.arity(i, 2..=2)?;
        if !o.flag("idx") {
            return self.unsupported(i);
        }
        let index = self.source(&i.operands[0], U32)?;
        let Operand::Name(list, 0) = &i.operands[1] else { return self.fail("expected a list of targets") };
        let Some(Binding::Targets(names)) = self.scopes.find(list).cloned() else {
            return self.fail(format!("`{list}` is no list of targets"));
        };
        let mut targets = Vec::new();
        for name in names {
            targets.push(self.label(&Operand::Name(name, 0))?);
        }
        self.emit(Op::BranchIndex(index, targets.into()), &[index], &[])
    }

    /// `call (results), function, (arguments)`, inlined.
    fn call(&mut self, i: &'m Instruction) -> Result<(), At> {
        let empty: &[Operand] = &[];
        let (results, name, arguments) = match i.operands.as_slice() {
            [Operand::List(results), Operand::Name(name, 0), Operand::List(arguments)] => {
                (results.as_slice(), name, arguments.as_slice())
            }
            [Operand::List(results), Operand::Name(name, 0)] => (results.as_slice(), name, empty),
            [Operand::Name(name, 0), Operand::List(arguments)] => (empty, name, arguments.as_slice()),
            [Operand::Name(name, 0)] => (empty, name, empty),
            _ => return self.fail("only direct calls are supported"),
        };
        let Some(function) = self.functions.get(name.as_str()).copied() else {
            return self.fail(format!("`{name}` is not declared; indirect calls are not supported"));
        };
        if function.returns.len() != results.len() || function.params.len() != arguments.len() {
            return self.fail(format!("`{name}` is called with another number of arguments than it has"));
        }
        let Some(body) = &function.body else { return self.system_call(name, results, arguments) };
        if self.stack.len() >= MAX_INLINE || self.stack.iter().any(|frame| frame.0 == *name) {
            return self.fail(format!("`{name}`: recursive calls are not supported"));
        }
        let bindings = self.bind_arguments(function, results, arguments)?;
        let end = self.new_label();
        self.stack.push((&function.name, Some(end)));
        self.scopes.enter(true);
        for (param, binding) in function.returns.iter().chain(&function.params).zip(&bindings) {
            self.scopes.bind(&param.name, binding.clone());
        }
        let opcode = self.opcode.clone();
        self.block(body)?;
        self.scopes.leave();
        self.stack.pop();
        self.place_label(end);
        (self.line, self.location, self.opcode) = (i.line, i.location, opcode);
        self.return_registers(function, results, &bindings)
    }

    /// What a function's parameters stand for: the caller's variables, or registers of their own.
    fn bind_arguments(
        &mut self,
        function: &Function,
        results: &[Operand],
        arguments: &[Operand],
    ) -> Result<Vec<Binding>, At> {
        let mut bindings = Vec::new();
        for (at, (param, operand)) in
            function.returns.iter().chain(&function.params).zip(results.iter().chain(arguments)).enumerate()
        {
            let input = at >= function.returns.len();
            bindings.push(self.bind_argument(param, operand, input)?);
        }
        Ok(bindings)
    }

    fn bind_argument(&mut self, param: &Parameter, operand: &Operand, input: bool) -> Result<Binding, At> {
        let Some(ty) = param.register else {
            let Operand::Name(name, 0) = operand else { return self.fail("expected a parameter variable") };
            return match self.scopes.find(name) {
                Some(found @ Binding::Address(..)) => Ok(found.clone()),
                _ => self.fail(format!("`{name}` is no parameter variable")),
            };
        };
        let reg = self.new_reg(class_of(ty));
        if input {
            let source = self.source(operand, ty)?;
            let copy = match reg.class {
                Class::Word => alu!(W; W a => a),
                Class::Double => alu!(D; D a => a),
                Class::Predicate => alu!(P; P a => a),
            };
            self.alu(copy, reg, &[source])?;
        }
        Ok(Binding::Register(reg, ty.bits))
    }

    fn return_registers(&mut self, function: &Function, results: &[Operand], bindings: &[Binding]) -> Result<(), At> {
        for ((param, operand), binding) in function.returns.iter().zip(results).zip(bindings) {
            if let (Some(ty), Binding::Register(reg, _)) = (param.register, binding) {
                let dst = self.dst(operand, ty)?;
                let copy = match reg.class {
                    Class::Word => alu!(W; W a => a),
                    Class::Double => alu!(D; D a => a),
                    Class::Predicate => alu!(P; P a => a),
                };
                self.alu(copy, dst, &[*reg])?;
            }
        }
        Ok(())
    }

    fn system_call(&mut self, name: &str, results: &[Operand], arguments: &[Operand]) -> Result<(), At> {
        let call = match name {
            "vprintf" => SystemCall::Print,
            "__assertfail" => SystemCall::AssertFail,
            _ => return self.fail(format!("`{name}` is declared, but not defined")),
        };
        let address = |operand: &Operand| match operand {
            Operand::Name(name, 0) => match self.scopes.find(name) {
                Some(Binding::Address(_, address)) => Ok(*address as u32),
                _ => self.fail(format!("`{name}` is no parameter variable")),
            },
            _ => self.fail("expected a parameter variable"),
        };
        let result = results.first().map(address).transpose()?;
        let places = arguments.iter().map(address).collect::<Result<Vec<_>, _>>()?;
        let expected = if call == SystemCall::Print { 2 } else { 5 };
        if places.len() != expected {
            return self.fail(format!("`{name}` takes {expected} arguments"));
        }
        self.emit(Op::System(call, result, places.into()), &[], &[])
    }
}
