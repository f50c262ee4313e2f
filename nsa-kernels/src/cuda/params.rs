//! Arguments of kernels: one struct each, declared once, here in Rust and from that in C++.

use std::marker::PhantomData;

/// A type of C++ with its name there.
pub(crate) trait Cpp: Copy {
    /// The name.
    const NAME: &'static str;
}

macro_rules! cpp {
    ($($rust:ty => $name:literal),* $(,)?) => {
        $(impl Cpp for $rust {
            const NAME: &'static str = $name;
        })*
    };
}

cpp!(f32 => "float", f64 => "double", i32 => "int", u32 => "unsigned", i64 => "long long", u64 => "unsigned long long");

/// The type of the call's tensors: `Element` in kernels.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stored;

/// The type of the call's weights: `Weight` in kernels.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Weight;

/// The type of gradients that the call writes: `Grad` in kernels.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grad;

cpp!(Stored => "Element", Weight => "Weight", Grad => "Grad");

/// The address of elements that a kernel reads.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub(crate) struct In<K>(pub(crate) u64, pub(crate) PhantomData<K>);

/// The address of elements that a kernel writes, or reads and writes.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub(crate) struct Out<K>(pub(crate) u64, pub(crate) PhantomData<K>);

impl<K> In<K> {
    /// No elements: null in kernels.
    pub(crate) fn none() -> Self {
        In(0, PhantomData)
    }

    /// Whether there are none.
    pub(crate) fn is_none(&self) -> bool {
        self.0 == 0
    }
}

impl<K> Out<K> {
    /// The same elements, which the kernel also reads.
    pub(crate) fn to_input(&self) -> In<K> {
        In(self.0, PhantomData)
    }
}

/// A type that a field of arguments can have.
pub(crate) trait Field: Copy {
    /// Its C++ declaration, without the field's name.
    fn cpp() -> String;
}

impl<K: Cpp> Field for In<K> {
    fn cpp() -> String {
        format!("const {}*", K::NAME)
    }
}

impl<K: Cpp> Field for Out<K> {
    fn cpp() -> String {
        format!("{}*", K::NAME)
    }
}

macro_rules! scalar_fields {
    ($($t:ty),*) => {
        $(impl Field for $t {
            fn cpp() -> String {
                <$t as Cpp>::NAME.to_owned()
            }
        })*
    };
}

scalar_fields!(f32, i32, u32, i64, u64);

/// An array in a struct of arguments, whose program includes `array.cuh`.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub(crate) struct Array<T, const N: usize>(pub(crate) [T; N]);

impl<T: Cpp, const N: usize> Field for Array<T, N> {
    fn cpp() -> String {
        format!("Array<{}, {N}>", T::NAME)
    }
}

/// A struct of arguments.
pub(crate) trait Params: Copy {
    /// The C++ declaration, with assertions that it lies in memory as this one does.
    fn declaration() -> String;
}

/// A field's name, C++ type and offset.
pub(crate) type Entry = (&'static str, String, usize);

/// The C++ struct of `size` bytes.
pub(crate) fn declaration(name: &str, size: usize, fields: &[Entry]) -> String {
    let members: String = fields.iter().map(|(field, cpp, _)| format!("    {cpp} {field};\n")).collect();
    let offsets: String = fields
        .iter()
        .map(|(field, _, offset)| {
            // NVRTC's offsetof.
            format!("static_assert(__INTADDR__(&((({name}*)0)->{field})) == {offset}, \"{name}::{field}\");\n")
        })
        .collect();
    let size = format!("static_assert(sizeof({name}) == {size}, \"{name}\");\n");
    format!("struct {name} {{\n{members}}};\n#ifdef __CUDACC_RTC__\n{size}{offsets}#endif\n")
}

/// Declares structs of arguments. A struct `Name` is `NameParams` in kernels.
macro_rules! params {
    ($($(#[$doc:meta])* struct $name:ident { $($(#[$field_doc:meta])* $field:ident: $ty:ty,)* })*) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Copy, Debug)]
            #[repr(C)]
            pub(crate) struct $name {
                $($(#[$field_doc])* pub(crate) $field: $ty,)*
            }

            impl $crate::cuda::params::Params for $name {
                fn declaration() -> String {
                    let fields = [$((
                        stringify!($field),
                        <$ty as $crate::cuda::params::Field>::cpp(),
                        std::mem::offset_of!($name, $field),
                    )),*];
                    let name = <Self as $crate::cuda::params::Cpp>::NAME;
                    $crate::cuda::params::declaration(name, size_of::<$name>(), &fields)
                }
            }

            impl $crate::cuda::params::Cpp for $name {
                const NAME: &'static str = concat!(stringify!($name), "Params");
            }
        )*
    };
}

pub(crate) use params;

#[cfg(test)]
mod tests {
    use super::*;

    params! {
        struct Example {
            x: In<Stored>,
            y: Out<f32>,
            rows: i64,
            factor: f32,
        }
    }

    #[test]
    fn a_struct_is_declared_with_its_layout() {
        let text = Example::declaration();
        assert!(
            text.starts_with("struct ExampleParams {\n    const Element* x;\n    float* y;\n    long long rows;\n")
        );
        assert!(
            text.contains("sizeof(ExampleParams) == 32") && text.contains("(((ExampleParams*)0)->factor)) == 24"),
            "{text}"
        );
    }
}
