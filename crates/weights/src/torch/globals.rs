//! [`Global`]: the classes and functions that files of `torch.save` name, and what each means here. None is ever
//! called.
//!
//! Any other name would be code to run, so the file is refused.

use super::Validated;
use crate::Dtype;

/// The meaning of a known name.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Global {
    /// Makes a dict.
    Dict,
    /// A dtype.
    Dtype(Dtype),
    /// Makes a value of this kind that no tensor needs.
    Other(&'static str),
    /// Makes a tensor from a storage that has a dtype.
    Tensor,
    /// Makes a tensor from an untyped storage; the dtype is an argument.
    TensorOf,
    /// Returns its first argument: a tensor as a parameter, or a shape.
    First,
    /// Calls another of these and adds attributes to its result.
    Subclass,
    /// A storage class, with its dtype if it has one.
    Storage(Option<Dtype>),
    /// A class that is only named: of tensors, or of a defaultdict's values.
    Type,
}

const NUMBER: Global = Global::Other("a number");
const SET: Global = Global::Other("a set");
const ARRAY: Global = Global::Other(ARRAY_KIND);

/// The kind of numpy arrays, whose values are not read.
pub(super) const ARRAY_KIND: &str = "a numpy array";

/// (module, name, meaning), sorted.
const KNOWN: &[(&str, &str, Global)] = &[
    ("__builtin__", "bytearray", Global::Other("bytes")),
    ("__builtin__", "complex", NUMBER),
    ("__builtin__", "dict", Global::Type),
    ("__builtin__", "float", Global::Type),
    ("__builtin__", "frozenset", SET),
    ("__builtin__", "int", Global::Type),
    ("__builtin__", "list", Global::Type),
    ("__builtin__", "set", SET),
    ("_codecs", "encode", Global::Other("bytes")),
    ("argparse", "Namespace", Global::Other("an argparse.Namespace")),
    ("collections", "OrderedDict", Global::Dict),
    ("collections", "defaultdict", Global::Dict),
    ("numpy", "dtype", Global::Other("a numpy dtype")),
    ("numpy", "ndarray", Global::Type),
    ("numpy._core.multiarray", "_reconstruct", ARRAY),
    ("numpy._core.multiarray", "scalar", NUMBER),
    ("numpy.core.multiarray", "_reconstruct", ARRAY),
    ("numpy.core.multiarray", "scalar", NUMBER),
    ("torch", "BFloat16Storage", Global::Storage(Some(Dtype::BF16))),
    ("torch", "BoolStorage", Global::Storage(Some(Dtype::BOOL))),
    ("torch", "ByteStorage", Global::Storage(Some(Dtype::U8))),
    ("torch", "CharStorage", Global::Storage(Some(Dtype::I8))),
    ("torch", "ComplexFloatStorage", Global::Storage(Some(Dtype::C64))),
    ("torch", "DoubleStorage", Global::Storage(Some(Dtype::F64))),
    ("torch", "FloatStorage", Global::Storage(Some(Dtype::F32))),
    ("torch", "HalfStorage", Global::Storage(Some(Dtype::F16))),
    ("torch", "IntStorage", Global::Storage(Some(Dtype::I32))),
    ("torch", "LongStorage", Global::Storage(Some(Dtype::I64))),
    ("torch", "ShortStorage", Global::Storage(Some(Dtype::I16))),
    ("torch", "Size", Global::First),
    ("torch", "Tensor", Global::Type),
    ("torch", "UntypedStorage", Global::Storage(None)),
    ("torch", "bfloat16", Global::Dtype(Dtype::BF16)),
    ("torch", "bool", Global::Dtype(Dtype::BOOL)),
    ("torch", "complex64", Global::Dtype(Dtype::C64)),
    ("torch", "device", Global::Other("a torch.device")),
    ("torch", "float16", Global::Dtype(Dtype::F16)),
    ("torch", "float32", Global::Dtype(Dtype::F32)),
    ("torch", "float64", Global::Dtype(Dtype::F64)),
    ("torch", "float8_e4m3fn", Global::Dtype(Dtype::F8_E4M3)),
    ("torch", "float8_e4m3fnuz", Global::Dtype(Dtype::F8_E4M3FNUZ)),
    ("torch", "float8_e5m2", Global::Dtype(Dtype::F8_E5M2)),
    ("torch", "float8_e5m2fnuz", Global::Dtype(Dtype::F8_E5M2FNUZ)),
    ("torch", "float8_e8m0fnu", Global::Dtype(Dtype::F8_E8M0)),
    ("torch", "int16", Global::Dtype(Dtype::I16)),
    ("torch", "int32", Global::Dtype(Dtype::I32)),
    ("torch", "int64", Global::Dtype(Dtype::I64)),
    ("torch", "int8", Global::Dtype(Dtype::I8)),
    ("torch", "uint16", Global::Dtype(Dtype::U16)),
    ("torch", "uint32", Global::Dtype(Dtype::U32)),
    ("torch", "uint64", Global::Dtype(Dtype::U64)),
    ("torch", "uint8", Global::Dtype(Dtype::U8)),
    ("torch._tensor", "_rebuild_from_type_v2", Global::Subclass),
    ("torch._utils", "_rebuild_from_type_v2", Global::Subclass),
    ("torch._utils", "_rebuild_parameter", Global::First),
    ("torch._utils", "_rebuild_parameter_with_state", Global::First),
    ("torch._utils", "_rebuild_tensor", Global::Tensor),
    ("torch._utils", "_rebuild_tensor_v2", Global::Tensor),
    ("torch._utils", "_rebuild_tensor_v3", Global::TensorOf),
    ("torch.nn.parameter", "Buffer", Global::Type),
    ("torch.nn.parameter", "Parameter", Global::Type),
    ("torch.storage", "TypedStorage", Global::Storage(None)),
    ("torch.storage", "UntypedStorage", Global::Storage(None)),
];

/// PyTorch dtypes that safetensors does not have, and so this crate neither.
const UNSUPPORTED_DTYPES: &[&str] = &[
    "ComplexDoubleStorage",
    "QInt32Storage",
    "QInt8Storage",
    "QUInt2x4Storage",
    "QUInt4x2Storage",
    "QUInt8Storage",
    "complex128",
    "complex32",
    "float4_e2m1fn_x2",
    "qint32",
    "qint8",
    "quint2x4",
    "quint4x2",
    "quint8",
];

/// Characters of an unknown name that a message prints.
const LONGEST_NAME: usize = 100;

impl Global {
    /// The meaning of `module.name`.
    pub fn named(module: &str, name: &str) -> Validated<Self> {
        // The list has the name of Python 2, which protocol 2 writes in Python 3 too.
        let listed_module = if module == "builtins" { "__builtin__" } else { module };
        let known = KNOWN.iter().find(|known| (known.0, known.1) == (listed_module, name));
        known.map(|known| known.2).ok_or_else(|| refusal(module, name))
    }
}

fn refusal(module: &str, name: &str) -> String {
    if module == "torch" && UNSUPPORTED_DTYPES.contains(&name) {
        return format!("torch.{name} is not a supported dtype: convert the tensor in PyTorch first");
    }
    let full: String = format!("{module}.{name}").chars().take(LONGEST_NAME).collect();
    if module == "torch._utils" && name.starts_with("_rebuild_") {
        let kinds = "a sparse, quantised or otherwise special tensor";
        return format!("{full:?} makes {kinds}, which is not supported: save it dense (to_dense(), dequantize())");
    }
    format!(
        "it names {full:?}, which is not plain data (a model or settings saved with their class, or malware): loading it \
         in Python would run that code, so it is refused; nothing was run. Ask for the file as safetensors, or, if you \
         trust it, load it where that code is installed and save its state_dict with safetensors.torch.save_file"
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_sorted_and_other_names_are_refused() {
        assert!(KNOWN.is_sorted_by_key(|known| (known.0, known.1)));
        assert!(UNSUPPORTED_DTYPES.is_sorted());
        assert_eq!(Global::named("builtins", "set").unwrap(), SET);
        for (module, name, expected) in [
            ("os", "system", "\"os.system\", which is not plain data"),
            ("builtins", "eval", "\"builtins.eval\""),
            ("torch._utils", "_rebuild_qtensor", "makes a sparse, quantised"),
            ("torch", "qint8", "torch.qint8 is not a supported dtype"),
            ("a\u{1b}[2J", "b", r#""a\u{1b}[2J.b""#),
            ("torch.storage", "_load_from_bytes", "\"torch.storage._load_from_bytes\""),
        ] {
            let message = Global::named(module, name).unwrap_err();
            assert!(message.contains(expected), "{message:?} does not contain {expected:?}");
        }
        assert!(Global::named(&"m".repeat(100_000), "n").unwrap_err().len() < 600);
    }
}
