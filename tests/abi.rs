//! The C interface of plugins: the header against the Rust structs, plugins written in C, and plugins that violate the
//! interface. The sources are in tests/abi; they are compiled with `cc`, or the compiler in the variable CC.
#![allow(clippy::unwrap_used)]

#[path = "parity/support.rs"]
mod support;

use candle_core::{DType, Device, Tensor};
use clearform_attention::AttentionPlan;
use clearform_layout::Hints;
use clearform_models::{Denoiser, DenoiserInput};
use clearform_plugin_host::{
    Adapter, ControlInput, ControlKind, ControlNetInput, ControlledDenoiser, PluginChoice, PluginRegistry,
    check_plugin, plugin_at,
};
use clearform_runtime::{AdapterRequest, Adapters, ReadOptions, RuntimeError, TransformerCheckpoint};
use clearform_weights::{Checkpoint, InMemoryTensors, TensorSource as _};
use std::collections::BTreeMap;
use std::env::consts::DLL_EXTENSION;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use support::{assert_close, fixture, json, relative_error, tensors, weights};
use tempfile::TempDir;

const BOUND: f64 = 1e-6;

/// Parameters of the base model: their names in the adapter, their canonical names, and their rows.
const PARAMETERS: [(&str, &str, usize); 3] = [
    ("proj_out.weight", "proj_out.weight", 16),
    ("double_blocks.1.img_mlp.2.bias", "transformer_blocks.1.ff.net.2.bias", 48),
    ("transformer_blocks_0_ff_net_2_weight", "transformer_blocks.0.ff.net.2.weight", 48),
];

/// Errors name the library of scale.c, or the adapter file.
const LIBRARY: &str = "libscale.";
const ADAPTER: &str = "factors.safetensors";

/// Builds of scale.c that violate the interface: the compiler flag, the number of factors in the file for
/// proj_out.weight (which has 16 rows), the path in the error, and its text.
const VIOLATIONS: [(&str, usize, &str, &str); 13] = [
    (
        "-DWRONG_MAJOR",
        16,
        LIBRARY,
        "built for version 99 of the plugin interface, expected 1: get the plugin's release",
    ),
    ("-DWRONG_INTERFACE", 16, LIBRARY, "but its description states \"clearform.adapter/1\""),
    ("-DNULL_PLUGIN", 16, LIBRARY, "clearform_plugin_v1 returned null: it does not support this version of clearform"),
    ("-DNULL_TABLE", 16, LIBRARY, "its table is null"),
    ("-DNULL_FUNCTION", 16, LIBRARY, "its function \"edit_tensors\" is null"),
    ("-DSHORT_TABLE", 16, LIBRARY, "its table has 8 bytes, expected at least "),
    ("-DFAIL_OPEN", 16, ADAPTER, "this build opens nothing"),
    ("-DFAIL_SILENTLY", 16, ADAPTER, "the plugin failed with status 1 and gave no reason"),
    ("-DWRONG_COUNT", 16, LIBRARY, "edit 0: it is made from the tensor with index 1000, but the file has 1 tensors"),
    (
        "-DWRONG_SHAPE",
        16,
        ADAPTER,
        "expected 16 x 48 for \"proj_out.weight\", found 17 x 1: the adapter was made for another",
    ),
    (
        "-DWRONG_SHAPE",
        15,
        ADAPTER,
        "proj_out.weight\": expected tensors for a weight of 16 x 1, found the shapes [[15]]",
    ),
    ("-DWRONG_TENSORS", 16, ADAPTER, "weight\": the plugin returned the wrong tensors for this kind of edit"),
    ("-DBAD_TENSOR", 16, "", "the plugin returned an invalid tensor: DLPack version 9, expected 1"),
];

#[test]
fn a_plugin_in_c_edits_weights_as_the_example_in_rust_does() {
    let (registry, folder) = registry_with("scale.c", &[]);
    let want = forward_scaled(&PARAMETERS);
    for (ending, registry) in [("c_scale", registry), ("channel_scale", support::registry())] {
        let file = factors_file(folder.path(), ending, &PARAMETERS.map(|(name, _, rows)| (name, rows)));
        assert_close(&edited(&file, &registry).unwrap(), &want, BOUND, ending);
    }
    assert_differs(&want, &forward(denoiser(&base()).as_ref()));
}

#[test]
fn a_controlnet_in_c_adds_its_constant() {
    let (registry, folder) = registry_with("constant.c", &[]);
    check_constant(&registry, folder.path());
}

/// abi/first-revision has the header before ClearformBranchInfo and ClearformStep grew.
#[test]
fn a_controlnet_built_with_the_first_revision_still_works() {
    let folder = tempfile::tempdir().unwrap();
    let library = library_of("constant.c", folder.path());
    let source = abi_folder().join("constant.c");
    cc_with(&abi_folder().join("first-revision"), "-std=c99", &["-shared", "-fPIC"], &source, &library);
    check_constant(&PluginRegistry::scan(&[folder.path().to_owned()]).unwrap(), folder.path());
    let checked = check_plugin(&plugin_at(&library).unwrap()).unwrap();
    assert!(checked.to_string().ends_with("1 of 1 examples passed"), "{checked}");
}

/// Checks the plugin of constant.c, which adds the same tensor after blocks 0 and 1.
fn check_constant(registry: &PluginRegistry, folder: &Path) {
    let path = folder.join("constant.safetensors");
    let constant = factors(48);
    save(&path, [("constant_residual".to_owned(), constant.clone())]);
    let request = AdapterRequest { path, ..AdapterRequest::default() };
    let active = Adapters::open(&[request], registry).unwrap().open_controlnets(&base()).unwrap().remove(0);
    let expected = ControlInput {
        kind: ControlKind::Latents,
        channels: 16,
        modes: 0,
        range: [-1.0, 1.0],
        unshifted: false,
        zero_pooled: false,
        embedded_latents: false,
    };
    assert_eq!(active.controlnet.input(), expected);
    let denoiser = denoiser(&base());
    let input = input();
    let control = ControlNetInput {
        controlnet: active.controlnet,
        control: input.latents.clone(),
        mode: None,
        guidance: None,
        scale: active.scale,
        interval: active.schedule.interval,
    };
    let controlled = ControlledDenoiser::new(denoiser.as_ref(), vec![control]).forward(&input).unwrap();
    let mut state = denoiser.embed(&input).unwrap();
    for index in 0..denoiser.block_count() {
        state = denoiser.block(index, state).unwrap();
        if index < 2 {
            state.image = state.image.broadcast_add(&constant).unwrap();
        }
    }
    assert_close(&controlled, &denoiser.head(&state).unwrap(), BOUND, "constant");
    assert_differs(&controlled, &forward(denoiser.as_ref()));
}

#[test]
fn the_examples_of_plugins_in_c_pass() {
    for source in ["scale.c", "constant.c"] {
        let folder = tempfile::tempdir().unwrap();
        let checked = check_plugin(&plugin_at(&compile(source, &[], folder.path())).unwrap()).unwrap();
        assert!(checked.to_string().ends_with("1 of 1 examples passed"), "{source}: {checked}");
    }
}

/// The base model stays unchanged, and afterwards a correct build of the same plugin works in the same process.
#[test]
fn a_plugin_that_violates_the_interface_is_an_error_that_names_the_violation() {
    let before = values(&forward(denoiser(&base()).as_ref()));
    for (flag, rows, path, reason) in VIOLATIONS {
        let (registry, folder) = registry_with("scale.c", &[flag]);
        let file = factors_file(folder.path(), "c_scale", &[("proj_out.weight", rows)]);
        let error = edited(&file, &registry).unwrap_err();
        assert!(error.contains(path) && error.contains(reason), "{flag}: {error}");
    }
    assert_eq!(values(&forward(denoiser(&base()).as_ref())), before);
    let (registry, folder) = registry_with("scale.c", &[]);
    let sample = edited(&factors_file(folder.path(), "c_scale", &[("proj_out.weight", 16)]), &registry).unwrap();
    assert_close(&sample, &forward_scaled(&PARAMETERS[..1]), BOUND, "a correct build");
}

#[test]
fn a_rejected_tensor_is_freed_with_its_deleter() {
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace");
    let (registry, _library) = registry_with("scale.c", &["-DBAD_TENSOR", &trace_flag(&trace)]);
    let error = edited(&factors_file(folder.path(), "c_scale", &[("proj_out.weight", 16)]), &registry).unwrap_err();
    assert!(error.contains("DLPack version 9, expected 1"), "{error}");
    assert_eq!(std::fs::read_to_string(trace).unwrap(), "loaded\nfreed\n");
}

#[test]
fn a_panic_in_a_plugin_is_an_error_with_its_message() {
    let tests = std::env::current_exe().unwrap();
    let library = tests.parent().unwrap().join(format!("libclearform_panicking.{DLL_EXTENSION}"));
    let checked = check_plugin(&plugin_at(&library).unwrap()).unwrap();
    let failures: BTreeMap<&str, &str> = checked.failures().collect();
    for (example, reason) in [
        ("open", "example.safetensors: the plugin panicked: in open"),
        ("tensors", "edit of \"transformer.x\": the plugin panicked: in tensors"),
        ("skipped", "skipped tensors: the plugin panicked: in skipped"),
    ] {
        assert!(failures[example].contains(reason), "{checked}");
    }
}

#[test]
fn a_library_is_loaded_only_to_open_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace");
    let (registry, _library) = registry_with("scale.c", &[&trace_flag(&trace)]);
    let file = Checkpoint::open(factors_file(folder.path(), "c_scale", &[("proj_out.weight", 16)])).unwrap();
    let file = Arc::new(file);
    let ids: Vec<&str> = registry.plugins().iter().map(|plugin| plugin.description.id.as_str()).collect();
    assert_eq!(ids, ["c-scale"]);
    let plugin = registry.choose(&file, &PluginChoice::default()).unwrap();
    let mut other_major = plugin.clone();
    other_major.description.abi = 2;
    let error = Adapter::open(&other_major, file.clone()).unwrap_err().to_string();
    assert!(error.contains("version 2 of the plugin interface"), "{error}");
    assert!(!trace.exists());
    assert_eq!(Adapter::open(plugin, file).unwrap().edits().len(), 1);
    assert_eq!(std::fs::read_to_string(trace).unwrap(), "loaded\n");
}

#[test]
fn a_library_inside_a_model_is_rejected_without_loading_it() {
    let model = tempfile::tempdir().unwrap();
    std::fs::write(model.path().join("model_index.json"), "{}").unwrap();
    let folder = model.path().join("plugins");
    let trace = model.path().join("trace");
    std::fs::create_dir(&folder).unwrap();
    let library = compile("scale.c", &[&trace_flag(&trace)], &folder);
    for error in [PluginRegistry::scan(&[folder]).unwrap_err(), plugin_at(&library).unwrap_err()] {
        assert!(error.to_string().contains("it is inside the model"), "{error}");
    }
    assert!(!trace.exists());
}

/// The prediction of the base model with the adapter at `path`.
fn edited(path: &Path, registry: &PluginRegistry) -> Result<Tensor, String> {
    let message = |error: RuntimeError| error.to_string();
    let request = AdapterRequest { path: path.to_owned(), ..AdapterRequest::default() };
    let adapters = Adapters::open(&[request], registry).map_err(message)?;
    let edited = adapters.apply_to(base(), None, &reading().manifests).map_err(message)?;
    let denoiser = edited.transformer.build(&AttentionPlan::full(), Some(DType::F32), &Device::Cpu).map_err(message)?;
    Ok(forward(denoiser.as_ref()))
}

/// The prediction of the base model with the rows of `parameters` multiplied by their factors, without a plugin.
fn forward_scaled(parameters: &[(&str, &str, usize)]) -> Tensor {
    let mut source = weights("flux/head24/weights.safetensors");
    for &(_, canonical, rows) in parameters {
        let weight = source.tensor(canonical).unwrap();
        let factors = factors(rows).reshape((rows, 1)).unwrap();
        let product = weight.reshape((rows, ())).unwrap().broadcast_mul(&factors).unwrap();
        source.insert(canonical, product.reshape(weight.shape()).unwrap());
    }
    let base = base();
    forward(base.architecture().build(&source, &AttentionPlan::full()).unwrap().as_ref())
}

fn base() -> TransformerCheckpoint {
    TransformerCheckpoint::open(&fixture("flux/head24/weights.safetensors"), &reading()).unwrap()
}

fn reading() -> ReadOptions {
    let hints = Hints { config: Some(json("flux/head24/config.json")), ..Hints::default() };
    ReadOptions { hints, ..ReadOptions::default_options().unwrap() }
}

fn denoiser(transformer: &TransformerCheckpoint) -> Box<dyn Denoiser> {
    transformer.build(&AttentionPlan::full(), Some(DType::F32), &Device::Cpu).unwrap()
}

fn forward(denoiser: &dyn Denoiser) -> Tensor {
    denoiser.forward(&input()).unwrap()
}

fn input() -> DenoiserInput {
    base().architecture().parse_input(tensors("lora/input.safetensors").into_iter().collect()).unwrap()
}

/// Fails if the two could be the same prediction: 1% is far above rounding.
fn assert_differs(a: &Tensor, b: &Tensor) {
    let error = relative_error(a, b);
    assert!(error > 0.01, "relative difference {error:.2e}");
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Different factors, none of them 1.
fn factors(rows: usize) -> Tensor {
    Tensor::from_iter((0..rows).map(|row| 1.25 + row as f32 / 64.0), &Device::Cpu).unwrap()
}

/// Writes an adapter with a factor for each row of `parameters`.
fn factors_file(folder: &Path, ending: &str, parameters: &[(&str, usize)]) -> PathBuf {
    let path = folder.join(ADAPTER);
    save(&path, parameters.iter().map(|(name, rows)| (format!("{name}.{ending}"), factors(*rows))));
    path
}

fn save(path: &Path, tensors: impl IntoIterator<Item = (String, Tensor)>) {
    let source: InMemoryTensors = tensors.into_iter().collect();
    clearform_weights::save(path, &source, &BTreeMap::new()).unwrap();
}

/// A registry with one build of `source`, and its folder, which is deleted when dropped.
fn registry_with(source: &str, flags: &[&str]) -> (PluginRegistry, TempDir) {
    let folder = tempfile::tempdir().unwrap();
    compile(source, flags, folder.path());
    (PluginRegistry::scan(&[folder.path().to_owned()]).unwrap(), folder)
}

/// Builds tests/abi/`source` into `folder`.
fn compile(source: &str, flags: &[&str], folder: &Path) -> PathBuf {
    let library = library_of(source, folder);
    let source = abi_folder().join(source);
    cc("-std=c99", &[&["-shared", "-fPIC"][..], flags].concat(), &source, &library);
    library
}

/// The library of tests/abi/`source` in `folder`.
fn library_of(source: &str, folder: &Path) -> PathBuf {
    folder.join(format!("lib{}.{DLL_EXTENSION}", source.strip_suffix(".c").unwrap()))
}

fn abi_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("abi")
}

/// The compiler flag for a build that writes events to the file at `path`.
fn trace_flag(path: &Path) -> String {
    format!("-DTRACE=\"{}\"", path.display())
}

/// Runs the C compiler, which must not print a warning.
fn cc(standard: &str, flags: &[&str], source: &Path, output: &Path) {
    cc_with(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/plugin-abi/include"),
        standard,
        flags,
        source,
        output,
    );
}

/// As [`cc`], with the header in the folder `include`.
fn cc_with(include: &Path, standard: &str, flags: &[&str], source: &Path, output: &Path) {
    let mut command = Command::new(std::env::var_os("CC").unwrap_or_else(|| "cc".into()));
    command.args([standard, "-Wall", "-Wextra", "-Werror", "-I"]).arg(include).args(flags);
    let done = command.arg(source).arg("-o").arg(output).output().expect("a C compiler: cc, or the one in CC");
    assert!(done.status.success(), "{command:?}\n{}", String::from_utf8_lossy(&done.stderr));
}

/// The header against the Rust structs.
mod header {
    use clearform_plugin_abi::dlpack::{
        CODE_BFLOAT, CODE_FLOAT, CODE_INT, CODE_UINT, DEVICE_CPU, DEVICE_CUDA, DLDataType, DLDevice,
        DLManagedTensorVersioned, DLPackVersion, DLTensor, FLAG_READ_ONLY, VERSION,
    };
    use clearform_plugin_abi::{
        ABI_MAJOR, ADAPTER_INTERFACE, CONTROL_LATENTS, CONTROL_PIXELS, CONTROLNET_INTERFACE, ClearformAdapterTable,
        ClearformBase, ClearformBranchInfo, ClearformBranchTable, ClearformEdit, ClearformEditTensors, ClearformFile,
        ClearformGiveResidual, ClearformHost, ClearformPair, ClearformPlugin, ClearformStep, ClearformTensorInfo,
        ClearformText, DESCRIPTION_BEGIN, DESCRIPTION_END, EDIT_DECOMPOSED, EDIT_DELTA, EDIT_LOW_RANK, EDIT_REPLACE,
        EDIT_SCALE, EMBEDDED_LATENTS, ENTRY_SYMBOL, FAILED, LOG_ERROR, LOG_INFO, LOG_WARNING, OK, UNSHIFTED_CONTROL,
        WHOLE_PARAMETER, ZERO_POOLED,
    };
    use std::mem::offset_of;
    use std::process::Command;

    const CONSTANTS: [(&str, i128); 29] = [
        ("CLEARFORM_ABI_MAJOR", ABI_MAJOR as i128),
        ("CLEARFORM_OK", OK as i128),
        ("CLEARFORM_FAILED", FAILED as i128),
        ("CLEARFORM_LOG_INFO", LOG_INFO as i128),
        ("CLEARFORM_LOG_WARNING", LOG_WARNING as i128),
        ("CLEARFORM_LOG_ERROR", LOG_ERROR as i128),
        ("CLEARFORM_EDIT_LOW_RANK", EDIT_LOW_RANK as i128),
        ("CLEARFORM_EDIT_DELTA", EDIT_DELTA as i128),
        ("CLEARFORM_EDIT_REPLACE", EDIT_REPLACE as i128),
        ("CLEARFORM_EDIT_SCALE", EDIT_SCALE as i128),
        ("CLEARFORM_EDIT_DECOMPOSED", EDIT_DECOMPOSED as i128),
        ("CLEARFORM_WHOLE_PARAMETER", WHOLE_PARAMETER as i128),
        ("CLEARFORM_CONTROL_LATENTS", CONTROL_LATENTS as i128),
        ("CLEARFORM_CONTROL_PIXELS", CONTROL_PIXELS as i128),
        ("CLEARFORM_UNSHIFTED_CONTROL", UNSHIFTED_CONTROL as i128),
        ("CLEARFORM_ZERO_POOLED", ZERO_POOLED as i128),
        ("CLEARFORM_EMBEDDED_LATENTS", EMBEDDED_LATENTS as i128),
        ("DLPACK_MAJOR_VERSION", VERSION.major as i128),
        ("DLPACK_MINOR_VERSION", VERSION.minor as i128),
        ("DLPACK_FLAG_BITMASK_READ_ONLY", FLAG_READ_ONLY as i128),
        ("kDLCPU", DEVICE_CPU as i128),
        ("kDLCUDA", DEVICE_CUDA as i128),
        ("kDLInt", CODE_INT as i128),
        ("kDLUInt", CODE_UINT as i128),
        ("kDLFloat", CODE_FLOAT as i128),
        ("kDLBfloat", CODE_BFLOAT as i128),
        ("sizeof(size_t)", size_of::<usize>() as i128),
        ("sizeof(void *)", size_of::<*const ()>() as i128),
        ("sizeof(ClearformGiveResidual)", size_of::<ClearformGiveResidual>() as i128),
    ];

    const TEXTS: [(&str, &str); 5] = [
        ("CLEARFORM_ENTRY_SYMBOL", ENTRY_SYMBOL),
        ("CLEARFORM_ADAPTER_INTERFACE", ADAPTER_INTERFACE),
        ("CLEARFORM_BRANCH_INTERFACE", CONTROLNET_INTERFACE),
        ("CLEARFORM_DESCRIPTION_BEGIN", DESCRIPTION_BEGIN),
        ("CLEARFORM_DESCRIPTION_END", DESCRIPTION_END),
    ];

    /// A struct's name, its size, and name, offset and size of each field.
    type Layout = (&'static str, usize, Vec<(&'static str, usize, usize)>);

    /// Defines `layouts`, which returns the [`Layout`] of each struct. It compiles only if every field is listed.
    macro_rules! layouts {
        ($($name:ident { $($field:ident),* $(,)? })*) => {
            $(const _: fn($name) = |$name { $($field: _),* }| ();)*

            fn layouts() -> Vec<Layout> {
                vec![$((
                    stringify!($name),
                    size_of::<$name>(),
                    vec![$((
                        stringify!($field),
                        offset_of!($name, $field),
                        field_size(|value: &$name| &value.$field),
                    )),*],
                )),*]
            }
        };
    }

    layouts! {
        DLPackVersion { major, minor }
        DLDevice { device_type, device_id }
        DLDataType { code, bits, lanes }
        DLTensor { data, device, ndim, dtype, shape, strides, byte_offset }
        DLManagedTensorVersioned { version, manager_ctx, deleter, flags, dl_tensor }
        ClearformText { data, length }
        ClearformPair { key, value }
        ClearformHost {
            abi_major, struct_size, context, threads, reserved, allocate, release, log, progress, fail,
        }
        ClearformPlugin { abi_major, struct_size, interface, table }
        ClearformTensorInfo { name, shape, ndim, dtype }
        ClearformFile {
            struct_size, reserved, context, tensors, tensor_count, metadata, metadata_count, config, read,
        }
        ClearformEdit {
            struct_size, kind, flags, reserved, component, parameter, first_row, rows, columns, scale, sources,
            source_count,
        }
        ClearformEditTensors { struct_size, reserved, down, up, value, magnitude }
        ClearformAdapterTable {
            struct_size, reserved, open, close, edit_count, edit, edit_tensors, skipped,
        }
        ClearformBase { struct_size, reserved, family, config, attention }
        ClearformBranchInfo { struct_size, control, channels, modes, low, high, flags, reserved }
        ClearformStep {
            struct_size, reserved, latents, timestep, text, pooled, guidance, image_ids, text_ids, control, mode,
            embedded,
        }
        ClearformBranchTable { struct_size, reserved, open, close, info, residuals }
    }

    fn field_size<T, F>(_: fn(&T) -> &F) -> usize {
        size_of::<F>()
    }

    #[test]
    fn the_header_matches_the_rust_structs() {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("header.c");
        let program = folder.path().join("header");
        std::fs::write(&source, program_text()).unwrap();
        super::cc("-std=c11", &[], &source, &program);
        let done = Command::new(program).output().unwrap();
        assert!(done.status.success(), "differs: {}", String::from_utf8_lossy(&done.stdout));
    }

    /// A C program that compiles if sizes, offsets and constants are those of Rust, and succeeds if the texts are.
    fn program_text() -> String {
        let assert_value =
            |(name, value): (&str, i128)| format!("_Static_assert({name} == {value}, \"{value} in Rust\");\n");
        let compare_text = |(name, text): (&str, &str)| {
            format!("    if (strcmp({name}, {text:?}) != 0) {{\n        puts({name:?});\n        return 1;\n    }}\n")
        };
        let assert_size = |(name, size): (String, i128)| assert_value((&name, size));
        let layouts: String = layouts().into_iter().flat_map(expressions).map(assert_size).collect();
        let constants: String = CONSTANTS.into_iter().map(assert_value).collect();
        let texts: String = TEXTS.into_iter().map(compare_text).collect();
        format!(
            "#include <clearform_plugin.h>\n#include <stdio.h>\n#include <string.h>\n{layouts}{constants}\
             int main(void) {{\n{texts}    return 0;\n}}\n"
        )
    }

    /// C expressions for a struct's size and its fields' offsets and sizes, with their values in Rust.
    fn expressions((name, size, fields): Layout) -> Vec<(String, i128)> {
        let field = |(field, offset, size): (&str, usize, usize)| {
            [
                (format!("offsetof({name}, {field})"), offset as i128),
                (format!("sizeof((({name} *)0)->{field})"), size as i128),
            ]
        };
        let whole = [(format!("sizeof({name})"), size as i128)];
        whole.into_iter().chain(fields.into_iter().flat_map(field)).collect()
    }
}
