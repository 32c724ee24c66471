//! [`ModelCard`]: README.md of a portable model, with the front matter that model hubs read.

use clearform_attention::{AttentionPlan, Policy};
use clearform_layout::Identified;
use clearform_portable_model::{AdapterRecord, ModelRecord, PatchRecord};
use std::path::{Component, Path};

/// Keys of a source's front matter that hold for what is made of it.
const INHERITED: [&str; 4] = ["license", "license_name", "license_link", "language"];

/// What the card says.
pub struct ModelCard<'a> {
    /// The transformer.
    pub identified: &'a Identified,
    /// Its attention.
    pub attention: &'a AttentionPlan,
    /// Where the source was read from.
    pub source: Option<&'a Path>,
    /// What was done to it.
    pub record: &'a ModelRecord,
}

impl ModelCard<'_> {
    /// The text of README.md.
    pub fn text(&self) -> String {
        let Self { identified, attention, .. } = self;
        let (family, variant) = (&identified.family, &identified.variant.name);
        let name = self.source.map(name_of).unwrap_or_else(|| family.clone());
        let source = match self.repository() {
            Some(repository) => format!("[{repository}](https://huggingface.co/{repository})"),
            None => format!("`{name}`"),
        };
        format!(
            "{front}# {name}, linear\n\n\
             A {family} diffusion transformer (variant {variant}) that clearform converted from {source}. Its \
             attention is `{attention}`: each image token attends to {context} (CLEAR, arXiv 2412.16112){cost}. \
             {origin}{adapters}clearform.toml contains the source files, {settings}and the size and hash of every file. The \
             license is that of the model it was made from.\n\n\
             ## How to run it\n\n\
             ```sh\nclearform generate FOLDER {prompt} -o out.png\n```\n\n{diffusers}",
            front = self.front_matter(),
            context = self.context(),
            origin = self.origin(),
            adapters = self.adapters(),
            settings = if self.record.distillation.is_some() { "the settings of the distillation, " } else { "" },
            cost = if self.has_pooled_context() { "" } else { COST },
            prompt = if self.takes_text() { "\"a lighthouse at dawn\"" } else { "--class 3" },
            diffusers = self.diffusers(),
        )
    }

    /// Where its attention has its weights from.
    fn origin(&self) -> String {
        let ModelRecord { patch, distillation, .. } = self.record;
        match (patch, distillation, self.record.distilled_for()) {
            (_, Some(_), Some(attention)) if attention != self.attention.to_string() => {
                format!("It was distilled for `{attention}`, so that its images are worse than with that. ")
            }
            (_, Some(_), _) => String::new(),
            (Some(PatchRecord { file, .. }), ..) => format!("Its attention is that of the patch `{file}`. "),
            (None, None, _) if self.attention == &AttentionPlan::full() => String::new(),
            (None, None, _) => {
                "It was not distilled: its weights are those of the source, which was trained with full \
                                attention, so its images are worse than the source's. "
                    .to_owned()
            }
        }
    }

    /// The adapters that were merged into it.
    fn adapters(&self) -> String {
        let named = |AdapterRecord { name, strength, .. }: &AdapterRecord| match strength {
            1.0 => format!("`{name}`"),
            strength => format!("`{name}` (strength {strength})"),
        };
        let names: Vec<String> = self.record.adapter.iter().map(named).collect();
        if names.is_empty() { String::new() } else { format!("Merged into it: {}. ", names.join(", ")) }
    }

    /// What an image token attends to.
    fn context(&self) -> String {
        let text = if self.takes_text() { "the text and to " } else { "" };
        let pooled = if self.has_pooled_context() { ", and to averages of the whole image" } else { "" };
        format!("{text}the image tokens within a radius{pooled}")
    }

    fn has_pooled_context(&self) -> bool {
        let policies = self.attention.exceptions().values().copied();
        policies
            .chain([self.attention.default_policy()])
            .any(|policy| matches!(policy, Policy::Clear { pool: Some(_), .. }))
    }

    /// The class in diffusers; `None` if it has none.
    fn class(&self) -> Option<&str> {
        self.identified.config["_class_name"].as_str().filter(|class| class.ends_with("Transformer2DModel"))
    }

    fn takes_text(&self) -> bool {
        self.identified.variant.defaults.text_tokens > 0
    }

    fn front_matter(&self) -> String {
        let mut lines = self.inherited();
        lines.extend(self.class().map(|_| "library_name: diffusers".to_owned()));
        lines.push(format!(
            "pipeline_tag: {}",
            if self.takes_text() { "text-to-image" } else { "unconditional-image-generation" }
        ));
        lines.extend(
            self.repository().map(|repository| format!("base_model: {repository}\nbase_model_relation: finetune")),
        );
        let tags = ["clearform", "linear-attention", self.identified.family.as_str()];
        lines.push(format!("tags:\n{}", tags.map(|tag| format!("- {tag}")).join("\n")));
        format!("---\n{}\n---\n", lines.join("\n"))
    }

    /// The lines of the source's own front matter that hold here too.
    fn inherited(&self) -> Vec<String> {
        let card =
            self.source.and_then(|source| std::fs::read_to_string(source.join("README.md")).ok()).unwrap_or_default();
        let lines = card.strip_prefix("---").and_then(|card| Some(card.split_once("\n---")?.0)).unwrap_or_default();
        let is_inherited = |line: &&str| line.split_once(": ").is_some_and(|(key, _)| INHERITED.contains(&key));
        lines.lines().filter(is_inherited).map(str::to_owned).collect()
    }

    /// The source's repository on a hub: from the place of a hub's cache, or from what its config says.
    fn repository(&self) -> Option<String> {
        let in_cache = self.source?.components().find_map(|part| {
            let Component::Normal(name) = part else { return None };
            Some(name.to_str()?.strip_prefix("models--")?.replacen("--", "/", 1))
        });
        in_cache.or_else(|| {
            let declared = self.identified.config["_name_or_path"].as_str()?;
            is_repository(declared).then(|| declared.to_owned())
        })
    }

    fn diffusers(&self) -> String {
        let Some(class) = self.class() else { return "diffusers has no class for it.\n".to_owned() };
        let distilled = if self.record.distilled_for().is_some() { ", nor what it was distilled for" } else { "" };
        let plain = format!(
            "diffusers can load the folder if it has the class in transformer/config.json. It then runs the transformer with \
             full attention, which is not linear{distilled}"
        );
        if class != "FluxTransformer2DModel" {
            return format!("{plain}.\n");
        }
        format!(
            "{plain}, unless CLEAR's attention processors are set. They are in its authors' repository \
             (https://github.com/Huage001/CLEAR); its notebooks show the calls for the diffusers version they were \
             written for:\n\n\
             ```python\nfrom diffusers import FluxPipeline\n\npipe = FluxPipeline.from_pretrained(\"FOLDER\")\n\
             # of CLEAR's repository: one processor per layer, and a mask for the image's size\n\
             pipe.transformer.set_attn_processor(attn_processors)\n```\n"
        )
    }
}

/// What the cost of an evaluation is without pooled context.
const COST: &str = ", so its cost grows with the number of pixels instead of its square";

/// `organisation/name`, and no path.
fn is_repository(text: &str) -> bool {
    let is_name = |part: &str| {
        let known = |letter: char| letter.is_ascii_alphanumeric() || "-_.".contains(letter);
        part.chars().all(known) && part.chars().any(|letter| letter.is_ascii_alphanumeric())
    };
    text.split_once('/').is_some_and(|(organisation, name)| is_name(organisation) && is_name(name))
}

/// The last part of a path, without the ending of a file.
fn name_of(path: &Path) -> String {
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    let endings = [".safetensors", ".gguf", ".pt", ".pth", ".ckpt", ".bin"];
    endings.iter().find_map(|ending| name.strip_suffix(ending)).unwrap_or(&name).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repositories_are_told_from_paths() {
        for (text, is) in [
            ("black-forest-labs/FLUX.1-dev", true),
            ("/models/flux", false),
            ("../flux", false),
            ("./flux", false),
            ("flux", false),
            ("a/b/c", false),
        ] {
            assert_eq!(is_repository(text), is, "{text}");
        }
        assert_eq!(name_of(Path::new("a/flux1-dev.safetensors")), "flux1-dev");
        assert_eq!(name_of(Path::new("a/FLUX.1-dev")), "FLUX.1-dev");
    }
}
