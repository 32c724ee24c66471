//! Holds every crate to one direction: no files import each other in a circle, but for a module and its own children.

use clearform_tests::{code_of, files, root};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// Modules of a crate by their path, such as `manifest::family`; the root's is empty.
type Modules = BTreeMap<String, String>;
type Edges = BTreeMap<String, BTreeSet<String>>;

#[test]
fn no_files_import_each_other_in_a_circle() {
    let mut crates = 0;
    let mut circles = Vec::new();
    for source in source_folders() {
        let modules = modules(&source);
        assert!(!modules.is_empty(), "{}: no modules", source.display());
        let edges = edges(&modules);
        circles.extend(circle(&edges).map(|circle| format!("{}: {}", source.display(), circle.join(" -> "))));
        crates += usize::from(modules.len() > 1);
    }
    assert!(circles.is_empty(), "these files import each other in a circle:\n{}", circles.join("\n"));
    assert!(crates >= 15, "only {crates} crates with several modules were read");
}

#[test]
fn a_circle_is_found_and_a_parent_is_none() {
    let source = |text: &str| text.to_owned();
    let mut modules = Modules::from([
        (String::new(), source("pub use a::A;")),
        (source("a"), source("use crate::b::{c::C, B};")),
        (source("b"), source("use self::c::C;")),
        (source("b::c"), source("use super::B;")),
    ]);
    assert_eq!(circle(&edges(&modules)), None);
    modules.insert(source("b::c"), source("fn f() -> crate::A {}"));
    let found = circle(&edges(&modules)).expect("a -> b::c -> a");
    assert!(found.contains(&source("a")) && found.contains(&source("b::c")), "{found:?}");
}

fn source_folders() -> Vec<std::path::PathBuf> {
    let mut folders = vec![root().join("kernels"), root().join("kernels/simulator/src")];
    for group in ["crates", "plugins"] {
        let entries = fs::read_dir(root().join(group)).expect("a folder of crates");
        folders.extend(entries.filter_map(|entry| Some(entry.ok()?.path().join("src"))).filter(|path| path.is_dir()));
    }
    folders
}

/// The modules below `source`, with their code; what is built for tests alone is left out.
fn modules(source: &Path) -> Modules {
    let kernels = source.ends_with("kernels");
    let paths = files(source).into_iter().filter(|path| path.extension().is_some_and(|ending| ending == "rs"));
    let mut modules = Modules::new();
    for path in paths {
        let relative = path.strip_prefix(source).expect("below the source").with_extension("");
        let mut names: Vec<String> = relative.iter().map(|name| name.to_string_lossy().into_owned()).collect();
        let last = names.last().expect("a name").clone();
        if last == "tests" || (kernels && names[0] == "simulator") {
            continue;
        }
        if last == "mod" || (names.len() == 1 && (last == "lib" || last == "main")) {
            names.pop();
        }
        let text = fs::read_to_string(&path).expect("a source file");
        modules.insert(names.join("::"), without_tests(&code_of(&text)));
    }
    modules
}

/// A file up to its module of tests, which ends it.
fn without_tests(code: &str) -> String {
    code.split("#[cfg(test)]").next().unwrap_or(code).to_owned()
}

fn edges(modules: &Modules) -> Edges {
    let exports: BTreeMap<&String, BTreeMap<String, String>> =
        modules.iter().map(|(module, code)| (module, exports(module, code, modules))).collect();
    let mut edges = Edges::new();
    for (module, code) in modules {
        let used = paths(module, code).into_iter().map(|path| defining_module(&path, modules, &exports));
        let used = used.filter(|used| !is_at_or_above(used, module));
        let children = modules.keys().filter(|child| !module.is_empty() && is_child(child, module)).cloned();
        edges.insert(module.clone(), used.chain(children).collect());
    }
    edges
}

/// Whether `above` is `module` itself or one that contains it: a child may use what its parents define.
fn is_at_or_above(above: &str, module: &str) -> bool {
    above.is_empty() || above == module || module.strip_prefix(above).is_some_and(|rest| rest.starts_with("::"))
}

/// Whether `child` is declared by `module`, which so depends on it.
fn is_child(child: &str, module: &str) -> bool {
    child.strip_prefix(module).and_then(|rest| rest.strip_prefix("::")).is_some_and(|name| !name.contains("::"))
}

/// Names that a module shows and another defines: `pub use`.
fn exports(module: &str, code: &str, modules: &Modules) -> BTreeMap<String, String> {
    let mut exports = BTreeMap::new();
    for statement in code.split(';') {
        let Some((_, tree)) =
            statement.trim_start().rsplit_once("pub use ").or_else(|| statement.rsplit_once("pub(crate) use "))
        else {
            continue;
        };
        for path in expand(tree) {
            let path = absolute(module, &path, modules);
            if let Some(name) = path.last() {
                exports.insert(name.clone(), path[..path.len() - 1].join("::"));
            }
        }
    }
    exports
}

/// Every path of `code` that begins at the crate, at the module or above it.
fn paths(module: &str, code: &str) -> Vec<Vec<String>> {
    let mut paths = Vec::new();
    for start in ["crate::", "super::", "self::"] {
        for (at, _) in code.match_indices(start) {
            let before = code[..at].chars().next_back();
            if before.is_some_and(|letter| letter.is_alphanumeric() || "_:$".contains(letter)) {
                continue;
            }
            let end = path_end(&code[at..]);
            paths.extend(expand(&code[at..at + end]).iter().map(|path| absolute(module, path, &Modules::new())));
        }
    }
    paths
}

/// Where a path with its braces ends.
fn path_end(text: &str) -> usize {
    let mut depth = 0usize;
    for (at, letter) in text.char_indices() {
        match letter {
            '{' if text[..at].ends_with("::") || depth > 0 => depth += 1,
            '}' if depth > 0 => depth -= 1,
            _ if letter.is_alphanumeric() || "_:".contains(letter) => {}
            _ if depth > 0 => {}
            _ => return at,
        }
    }
    text.len()
}

/// The paths of a `use` tree: `a::{b, c::{self, D}}` is `a::b`, `a::c` and `a::c::D`.
fn expand(tree: &str) -> Vec<Vec<String>> {
    let tree = tree.trim();
    let Some(open) = tree.find('{') else {
        let path = tree.split(" as ").next().unwrap_or(tree);
        let names = path.split("::").map(str::trim).filter(|name| !name.is_empty() && *name != "*");
        return vec![names.map(str::to_owned).collect()];
    };
    let (stem, inner) = (&tree[..open], tree[open + 1..].trim_end().trim_end_matches('}'));
    let stem: Vec<String> =
        stem.split("::").map(str::trim).filter(|name| !name.is_empty()).map(str::to_owned).collect();
    let branches = split_outside_braces(inner);
    let paths = branches.into_iter().flat_map(expand).map(|path| {
        let rest = path.into_iter().filter(|name| name != "self");
        stem.iter().cloned().chain(rest).collect()
    });
    paths.collect()
}

fn split_outside_braces(text: &str) -> Vec<&str> {
    let mut depth = 0i32;
    let mut pieces = Vec::new();
    let mut begin = 0;
    for (at, letter) in text.char_indices() {
        match letter {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                pieces.push(&text[begin..at]);
                begin = at + 1;
            }
            _ => {}
        }
    }
    pieces.push(&text[begin..]);
    pieces.retain(|piece| !piece.trim().is_empty());
    pieces
}

/// `path` from the root of the crate; a path without a start is one of `module`'s own children.
fn absolute(module: &str, path: &[String], modules: &Modules) -> Vec<String> {
    let mut base: Vec<String> = module.split("::").filter(|name| !name.is_empty()).map(str::to_owned).collect();
    let mut names = path.iter().peekable();
    match names.peek().map(|name| name.as_str()) {
        Some("crate") => {
            base.clear();
            names.next();
        }
        Some("self") => {
            names.next();
        }
        Some("super") => {}
        Some(first) if !modules.contains_key(&[&base[..], &[first.to_owned()]].concat().join("::")) => base.clear(),
        _ => {}
    }
    while names.peek().is_some_and(|name| *name == "super") {
        base.pop();
        names.next();
    }
    base.into_iter().chain(names.cloned()).collect()
}

/// The module that defines what `path` names: the longest part of it that is a module, and what that one takes the next
/// name from, if it takes it from elsewhere.
fn defining_module(
    path: &[String],
    modules: &Modules,
    exports: &BTreeMap<&String, BTreeMap<String, String>>,
) -> String {
    let length = (0..=path.len()).rev().find(|length| modules.contains_key(&path[..*length].join("::"))).unwrap_or(0);
    let module = path[..length].join("::");
    let taken = path.get(length).and_then(|name| exports.get(&module)?.get(name));
    match taken {
        Some(from) if modules.contains_key(from) && *from != module => from.clone(),
        _ => module,
    }
}

/// Modules that lead back to the first of them, if there are any.
fn circle(edges: &Edges) -> Option<Vec<String>> {
    let mut done = BTreeSet::new();
    edges.keys().find_map(|module| follow(module, edges, &mut Vec::new(), &mut done))
}

fn follow(module: &String, edges: &Edges, way: &mut Vec<String>, done: &mut BTreeSet<String>) -> Option<Vec<String>> {
    if let Some(begin) = way.iter().position(|passed| passed == module) {
        return Some(way[begin..].to_vec());
    }
    if done.contains(module) {
        return None;
    }
    way.push(module.clone());
    let found = edges.get(module).into_iter().flatten().find_map(|next| follow(next, edges, way, done));
    way.pop();
    done.insert(module.clone());
    found
}
