//! [`TensorName`]: a tensor's name split into the component of the pipeline, the module, and the tensor's role there.

/// The role of a tensor in its module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum TensorRole {
    /// First factor (lora_A).
    Down,
    /// Second factor (lora_B).
    Up,
    /// Change of the bias, scaled like the factors.
    UpBias,
    /// Alpha; the scale is alpha / rank.
    Alpha,
    /// Norms of the edited weight (DoRA).
    Magnitude,
    /// Factors of a Hadamard product (LoHa).
    HadaW1A,
    HadaW1B,
    HadaW2A,
    HadaW2B,
    /// Factors of a Kronecker product (LoKr), each of them whole or itself a product of two.
    LokrW1,
    LokrW1A,
    LokrW1B,
    LokrW2,
    LokrW2A,
    LokrW2B,
    /// Change of the weight, or of the bias.
    Diff,
    DiffBias,
    /// New value of the weight.
    SetWeight,
    /// New value of a parameter, stored under the parameter's own name.
    Parameter,
    /// Shape of a widened weight, which also follows from its factors.
    Shape,
    /// Cores of Tucker-decomposed convolutions: of a LoRA, of the products of a LoHa, of the second factor of a LoKr.
    Mid,
    HadaT1,
    HadaT2,
    LokrT2,
}

/// Endings of names, with their roles. The first match counts. Some files have an underscore in place of the first dot.
const ENDINGS: &[(&str, TensorRole)] = &[
    (".lora_down.weight", TensorRole::Down),
    (".lora_up.weight", TensorRole::Up),
    (".lora_mid.weight", TensorRole::Mid),
    (".lora_A.weight", TensorRole::Down),
    (".lora_B.weight", TensorRole::Up),
    (".lora_B.bias", TensorRole::UpBias),
    (".lora_A", TensorRole::Down),
    (".lora_B", TensorRole::Up),
    (".lora.down.weight", TensorRole::Down),
    (".lora.up.weight", TensorRole::Up),
    ("_lora.down.weight", TensorRole::Down),
    ("_lora.up.weight", TensorRole::Up),
    (".lora_linear_layer.down.weight", TensorRole::Down),
    (".lora_linear_layer.up.weight", TensorRole::Up),
    (".alpha", TensorRole::Alpha),
    (".dora_scale", TensorRole::Magnitude),
    (".lora_magnitude_vector.weight", TensorRole::Magnitude),
    (".lora_magnitude_vector", TensorRole::Magnitude),
    (".hada_w1_a", TensorRole::HadaW1A),
    (".hada_w1_b", TensorRole::HadaW1B),
    (".hada_w2_a", TensorRole::HadaW2A),
    (".hada_w2_b", TensorRole::HadaW2B),
    (".hada_t1", TensorRole::HadaT1),
    (".hada_t2", TensorRole::HadaT2),
    (".lokr_w1", TensorRole::LokrW1),
    (".lokr_w1_a", TensorRole::LokrW1A),
    (".lokr_w1_b", TensorRole::LokrW1B),
    (".lokr_w2", TensorRole::LokrW2),
    (".lokr_w2_a", TensorRole::LokrW2A),
    (".lokr_w2_b", TensorRole::LokrW2B),
    (".lokr_t2", TensorRole::LokrT2),
    (".diff", TensorRole::Diff),
    (".diff_b", TensorRole::DiffBias),
    (".w_norm", TensorRole::Diff),
    (".b_norm", TensorRole::DiffBias),
    (".set_weight", TensorRole::SetWeight),
    (".reshape_weight", TensorRole::Shape),
];

/// Any text encoder. T5 is the first in one family, the second in another and the third in a third; peft's names do
/// not tell the encoder.
const ANY_TEXT_ENCODER: &str = "text_encoder*";

/// How the modules of text encoders begin in CLIP and T5 of transformers. No transformer has such modules.
const ENCODER_MODULES: [&str; 3] = ["text_model.", "encoder.", "text_projection."];
/// peft's prefix of every name.
const PEFT: &str = "base_model.model.";

/// Prefixes of names, with their components. The first match counts; without a prefix, a name belongs to the
/// transformer.
const PREFIXES: &[(&str, &str)] = &[
    ("lora_unet_", "transformer"),
    ("lora_transformer_", "transformer"),
    ("lycoris_", "transformer"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te3_", ANY_TEXT_ENCODER),
    ("lora_te_", "text_encoder"),
    ("text_encoder.", "text_encoder"),
    ("text_encoder_2.", "text_encoder_2"),
    ("text_encoder_3.", "text_encoder_3"),
    ("model.diffusion_model.", "transformer"),
    ("diffusion_model.", "transformer"),
    ("transformer.", "transformer"),
    ("unet.", "transformer"),
];

/// ComfyUI's and OneTrainer's names of text encoders, with their components. ComfyUI writes "text_encoders." before
/// and "transformer." after them, or one of the two.
const TEXT_ENCODERS: &[(&str, &str)] = &[
    ("clip_l.", "text_encoder"),
    ("clip_g.", "text_encoder_2"),
    ("t5xxl.", ANY_TEXT_ENCODER),
    ("t5.", ANY_TEXT_ENCODER),
];

/// XLabs' names for FLUX's projections, with the modules that they edit. In double blocks, 1 is the image stream and 2
/// the text stream. In single blocks, q, k and v are the first rows of linear1.
const XLABS: &[(&str, &str)] = &[
    (".processor.qkv_lora1", ".img_attn.qkv"),
    (".processor.qkv_lora2", ".txt_attn.qkv"),
    (".processor.proj_lora1", ".img_attn.proj"),
    (".processor.proj_lora2", ".txt_attn.proj"),
    (".processor.qkv_lora", ".linear1"),
    (".processor.proj_lora", ".linear2"),
];

/// The parts of a tensor's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorName {
    /// Component of the pipeline.
    pub component: &'static str,
    /// Module, or the parameter for [`TensorRole::Parameter`].
    pub module: String,
    /// Role of the tensor in the module.
    pub role: TensorRole,
    /// Whether the tensor covers only the first rows of the module.
    pub first_rows: bool,
}

impl TensorName {
    /// Splits `name`; `None` if it is in no known format.
    pub fn parse(name: &str) -> Option<Self> {
        let (component, rest) = component(name);
        if let Some(xlabs) = xlabs(component, rest) {
            return Some(xlabs);
        }
        let rest = without_adapter_name(rest);
        let (module, role) = match split_ending(&rest) {
            Some(split) => split,
            None if is_parameter(&rest) => (rest.as_str(), TensorRole::Parameter),
            None => return None,
        };
        Some(Self { component, module: module.to_owned(), role, first_rows: false })
    }
}

/// The component of the pipeline, and the rest of the name. peft's own prefix may follow the component's.
fn component(name: &str) -> (&'static str, &str) {
    if let Some(module) = name.strip_prefix(PEFT) {
        let is_encoder = ENCODER_MODULES.iter().any(|start| module.starts_with(start));
        return (if is_encoder { ANY_TEXT_ENCODER } else { "transformer" }, module);
    }
    let found = PREFIXES.iter().find_map(|(prefix, component)| Some((*component, name.strip_prefix(prefix)?)));
    let (component, rest) = found.or_else(|| text_encoder(name)).unwrap_or(("transformer", name));
    (component, rest.strip_prefix(PEFT).unwrap_or(rest))
}

/// The component of a text encoder by ComfyUI's or OneTrainer's name, and the rest of the name.
fn text_encoder(name: &str) -> Option<(&'static str, &str)> {
    let name = name.strip_prefix("text_encoders.").unwrap_or(name);
    let found = TEXT_ENCODERS.iter().find_map(|(encoder, component)| Some((*component, name.strip_prefix(encoder)?)));
    found.map(|(component, rest)| (component, rest.strip_prefix("transformer.").unwrap_or(rest)))
}

/// The module and the role of a tensor, by the ending of its name.
fn split_ending(name: &str) -> Option<(&str, TensorRole)> {
    let with_dot = |(ending, role): &(&str, TensorRole)| Some((name.strip_suffix(ending)?, *role));
    let joined = |(ending, role): &(&str, TensorRole)| {
        let module = name.strip_suffix(ending.strip_prefix('.')?)?.strip_suffix('_')?;
        Some((module, *role))
    };
    let found = ENDINGS.iter().find_map(with_dot).or_else(|| ENDINGS.iter().find_map(joined));
    found.filter(|(module, _)| !module.is_empty())
}

/// A name in XLabs' format.
fn xlabs(component: &'static str, name: &str) -> Option<TensorName> {
    let (stem, role) = match name.strip_suffix(".down.weight") {
        Some(stem) => (stem, TensorRole::Down),
        None => (name.strip_suffix(".up.weight")?, TensorRole::Up),
    };
    let (block, module) = XLABS.iter().find_map(|(ending, module)| Some((stem.strip_suffix(ending)?, *module)))?;
    Some(TensorName { component, module: format!("{block}{module}"), role, first_rows: module == ".linear1" })
}

/// Removes the adapter's name, which peft writes after that of the factor: lora_A.default.weight.
fn without_adapter_name(name: &str) -> String {
    for factor in [".lora_A.", ".lora_B.", ".lora_magnitude_vector."] {
        if let Some((module, rest)) = name.split_once(factor)
            && let Some((_, last)) = rest.rsplit_once('.')
        {
            return format!("{module}{factor}{last}");
        }
    }
    name.to_owned()
}

/// Whether `name` is that of a parameter itself, like the norms in BFL's control LoRAs.
fn is_parameter(name: &str) -> bool {
    let has_adapter_name = ["lora", "lokr", "hada", "oft_", "glora"].iter().any(|part| name.contains(part));
    !has_adapter_name && [".weight", ".bias", ".scale"].iter().any(|ending| name.ends_with(ending))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_every_format_are_split() {
        let cases = [
            (
                "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
                "transformer",
                "transformer_blocks.0.attn.to_q",
                TensorRole::Down,
            ),
            ("base_model.model.x_embedder.lora_B.default.weight", "transformer", "x_embedder", TensorRole::Up),
            (
                "base_model.model.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
                "text_encoder*",
                "text_model.encoder.layers.0.mlp.fc1",
                TensorRole::Down,
            ),
            (
                "base_model.model.encoder.layers.0.mlp.fc1.alpha",
                "text_encoder*",
                "encoder.layers.0.mlp.fc1",
                TensorRole::Alpha,
            ),
            ("base_model.model.x_embedder.lora_B.my.style.bias", "transformer", "x_embedder", TensorRole::UpBias),
            ("transformer.proj_out.lora_magnitude_vector", "transformer", "proj_out", TensorRole::Magnitude),
            ("proj_out.lora_magnitude_vector.default.weight", "transformer", "proj_out", TensorRole::Magnitude),
            (
                "lora_unet_single_blocks_0_linear1.lora_up.weight",
                "transformer",
                "single_blocks_0_linear1",
                TensorRole::Up,
            ),
            (
                "lora_te3_encoder_block_0_layer_0_SelfAttention_q.alpha",
                "text_encoder*",
                "encoder_block_0_layer_0_SelfAttention_q",
                TensorRole::Alpha,
            ),
            (
                "lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight",
                "transformer",
                "transformer_blocks_0_attn_to_q",
                TensorRole::Down,
            ),
            ("diffusion_model.img_in.diff_b", "transformer", "img_in", TensorRole::DiffBias),
            (
                "double_blocks.0.img_attn.norm.query_norm.scale",
                "transformer",
                "double_blocks.0.img_attn.norm.query_norm.scale",
                TensorRole::Parameter,
            ),
            ("transformer.a.to_q.lora.down.weight", "transformer", "a.to_q", TensorRole::Down),
            ("transformer.a.processor.to_q_lora.up.weight", "transformer", "a.processor.to_q", TensorRole::Up),
            (
                "double_blocks.4.processor.proj_lora2.down.weight",
                "transformer",
                "double_blocks.4.txt_attn.proj",
                TensorRole::Down,
            ),
        ];
        for (name, component, module, role) in cases {
            let expected = TensorName { component, module: module.to_owned(), role, first_rows: false };
            assert_eq!(TensorName::parse(name), Some(expected), "{name}");
        }
        let single = TensorName::parse("diffusion_model.single_blocks.4.processor.qkv_lora.up.weight").unwrap();
        assert_eq!((single.module.as_str(), single.first_rows), ("single_blocks.4.linear1", true));
    }

    /// Every ending may be joined to the module, and every writer's prefix of a text encoder is known.
    #[test]
    fn joined_endings_and_prefixes_of_text_encoders_are_split() {
        for (ending, role) in ENDINGS.iter().filter(|(ending, _)| ending.starts_with('.')) {
            let name = format!("lora_transformer_a_to_q_{}", &ending[1..]);
            let parsed = TensorName::parse(&name).unwrap_or_else(|| panic!("{name}"));
            assert_eq!((parsed.module.as_str(), parsed.role), ("a_to_q", *role), "{name}");
        }
        let encoders = [
            ("clip_l", "text_encoder"),
            ("clip_g", "text_encoder_2"),
            ("t5xxl", ANY_TEXT_ENCODER),
            ("t5", ANY_TEXT_ENCODER),
        ];
        for (encoder, component) in encoders {
            for name in [
                format!("{encoder}.a.b"),
                format!("{encoder}.transformer.a.b"),
                format!("text_encoders.{encoder}.a.b"),
                format!("text_encoders.{encoder}.transformer.a.b"),
            ] {
                let parsed = TensorName::parse(&format!("{name}.lora_up.weight")).unwrap();
                assert_eq!((parsed.component, parsed.module.as_str()), (component, "a.b"), "{name}");
            }
        }
        let nested = TensorName::parse("transformer.base_model.model.a.b.lora_A.weight").unwrap();
        assert_eq!((nested.component, nested.module.as_str()), ("transformer", "a.b"));
    }

    #[test]
    fn unknown_names_are_rejected() {
        for name in ["totally.unknown", "a.oft_blocks.weight", "lora_down", ".alpha", "a.glora.weight"] {
            assert_eq!(TensorName::parse(name), None, "{name}");
        }
    }
}
