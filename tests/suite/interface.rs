//! The public interface against the list of it, `interface.txt` beside this file, so that it does not change unnoticed.
//!
//! The list is the sources without bodies, values, documentation and all that is not `pub`: what is `pub` can be reached, or
//! the lint `unreachable_pub` would say so. It is made from the sources alone, since what a compiler says of an interface
//! differs with its version. Names stand as they are written. Traits that nobody implements by name, such as `Send`, or that a
//! macro implements, are not there.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use syn::visit_mut::{self, VisitMut};
use syn::{
    Attribute, Block, Fields, File, Ident, ImplItem, ImplItemConst, Item, ItemConst, ItemEnum, ItemFn, ItemImpl,
    ItemMod, ItemStatic, ItemStruct, ItemTrait, ItemType, ItemUse, Meta, PatIdent, Receiver, Type, Visibility,
    parse_quote,
};

const HEADER: &str = "\
// The public interface as Rust without bodies, made by interface.rs beside this file. A field `_private` stands for all that are
// private; modules without `pub` are where it is written, not how it is called.

";

#[test]
fn the_public_interface_is_the_listed_one() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let found = interface(&root.join("src/lib.rs"));
    let path = root.join("tests/suite/interface.txt");
    if std::env::var_os("UPDATE_INTERFACE").is_some() {
        fs::write(&path, &found).unwrap();
    }
    let listed = fs::read_to_string(&path).unwrap_or_default();
    let only = |of: &str, other: &str, sign: &str| -> String {
        let other: BTreeSet<&str> = other.lines().collect();
        of.lines().filter(|line| !other.contains(line)).map(|line| format!("{sign} {line}\n")).collect()
    };
    assert!(
        found == listed,
        "the public interface has changed; if it was meant to, write the list anew and say so in CHANGELOG.md:\n\
         UPDATE_INTERFACE=1 cargo test --test suite interface\n{}{}",
        only(&listed, &found, "-"),
        only(&found, &listed, "+")
    );
}

/// What is public of a crate, as Rust without bodies.
fn interface(root: &Path) -> String {
    let mut file = parse(root);
    file.attrs.clear();
    let mut types = Types::default();
    types.strip(&mut file.items, root.parent().unwrap());
    types.strip_impls(&mut file.items);
    Shape.visit_file_mut(&mut file);
    HEADER.to_owned() + &prettyplease::unparse(&file)
}

fn parse(path: &Path) -> File {
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    syn::parse_file(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn is_public(visibility: &Visibility) -> bool {
    matches!(visibility, Visibility::Public(_))
}

/// Of the items that can be public.
fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(ItemConst { attrs, .. })
        | Item::Enum(ItemEnum { attrs, .. })
        | Item::Fn(ItemFn { attrs, .. })
        | Item::Impl(ItemImpl { attrs, .. })
        | Item::Mod(ItemMod { attrs, .. })
        | Item::Static(ItemStatic { attrs, .. })
        | Item::Struct(ItemStruct { attrs, .. })
        | Item::Trait(ItemTrait { attrs, .. })
        | Item::Type(ItemType { attrs, .. })
        | Item::Use(ItemUse { attrs, .. }) => attrs,
        _ => &[],
    }
}

/// Whether what has this attribute is in tests only.
fn is_for_tests(attribute: &Attribute) -> bool {
    let Meta::List(cfg) = &attribute.meta else { return false };
    cfg.path.is_ident("cfg") && ["test", "doctest", "fuzzing"].contains(&cfg.tokens.to_string().as_str())
}

/// The names of a crate's types and traits.
#[derive(Default)]
struct Types {
    public: BTreeSet<Ident>,
    private: BTreeSet<Ident>,
}

impl Types {
    /// Notes a type, and says whether it is public.
    fn note(&mut self, name: &Ident, visibility: &Visibility) -> bool {
        let public = is_public(visibility);
        if public { &mut self.public } else { &mut self.private }.insert(name.clone());
        public
    }

    /// Leaves what is public of a module's items; the files of its modules are in `folder`.
    fn strip(&mut self, items: &mut Vec<Item>, folder: &Path) {
        items.retain(|item| !attributes(item).iter().any(is_for_tests));
        items.retain_mut(|item| match item {
            Item::Mod(module) => self.strip_module(module, folder),
            Item::Impl(block) => {
                let of_trait = block.trait_.is_some();
                block.items.retain(|item| match item {
                    ImplItem::Const(item) => of_trait || is_public(&item.vis),
                    ImplItem::Type(_) => true,
                    // Those of a trait are the trait's.
                    ImplItem::Fn(item) => is_public(&item.vis),
                    ImplItem::Macro(_) => !of_trait,
                    _ => panic!("no rule for an item of this kind"),
                });
                of_trait || !block.items.is_empty()
            }
            Item::Struct(item) => {
                strip_fields(&mut item.fields);
                self.note(&item.ident, &item.vis)
            }
            Item::Enum(item) => self.note(&item.ident, &item.vis),
            Item::Trait(item) => self.note(&item.ident, &item.vis),
            Item::Type(item) => is_public(&item.vis),
            Item::Fn(item) => is_public(&item.vis),
            Item::Const(item) => is_public(&item.vis),
            Item::Static(item) => is_public(&item.vis),
            Item::Use(item) => is_public(&item.vis),
            // No macro is exported, and no function of a C library; what macros are called for here are `impl` blocks.
            Item::Macro(_) | Item::ForeignMod(_) => false,
            _ => panic!("no rule for an item of this kind"),
        });
    }

    /// The same for a module in its place or in a file; says whether anything is left.
    fn strip_module(&mut self, module: &mut ItemMod, folder: &Path) -> bool {
        let inner = folder.join(module.ident.to_string());
        let (_, items) = module.content.get_or_insert_with(|| {
            let beside = inner.with_extension("rs");
            let file = parse(&if beside.is_file() { beside } else { inner.join("mod.rs") });
            (Default::default(), file.items)
        });
        module.semi = None;
        self.strip(items, &inner);
        !items.is_empty()
    }

    /// Leaves out the `impl` blocks of and for what is not public.
    fn strip_impls(&self, items: &mut Vec<Item>) {
        items.retain_mut(|item| match item {
            Item::Mod(ItemMod { content: Some((_, items)), .. }) => {
                self.strip_impls(items);
                !items.is_empty()
            }
            Item::Impl(ItemImpl { self_ty, trait_, .. }) => {
                let of = if let Type::Path(of) = &**self_ty { of.path.segments.last() } else { None };
                let implemented = trait_.as_ref().and_then(|(_, path, _)| path.segments.last());
                let is_private = |name| self.private.contains(name) && !self.public.contains(name);
                !of.into_iter().chain(implemented).any(|segment| is_private(&segment.ident))
            }
            _ => true,
        });
    }
}

/// Private fields are one without a name or type: who can see it cannot make such a value.
fn strip_fields(fields: &mut Fields) {
    let all = fields.len();
    match fields {
        Fields::Named(fields) => {
            fields.named = fields.named.iter().filter(|field| is_public(&field.vis)).cloned().collect();
            if fields.named.len() < all {
                fields.named.push(parse_quote!(_private: _));
            }
        }
        Fields::Unnamed(fields) => {
            for field in fields.unnamed.iter_mut().filter(|field| !is_public(&field.vis)) {
                field.ty = parse_quote!(_);
                field.vis = Visibility::Inherited;
            }
        }
        Fields::Unit => {}
    }
}

/// Takes out what is no interface: bodies, values, documentation, and which arguments a body changes.
struct Shape;

impl VisitMut for Shape {
    fn visit_attributes_mut(&mut self, attributes: &mut Vec<Attribute>) {
        const KEPT: [&str; 6] = ["cfg", "default", "deprecated", "derive", "must_use", "non_exhaustive"];
        attributes.retain(|attribute| KEPT.iter().any(|name| attribute.path().is_ident(name)));
        for attribute in attributes {
            if attribute.path().is_ident("must_use") {
                attribute.meta = parse_quote!(must_use);
            }
        }
    }

    fn visit_block_mut(&mut self, block: &mut Block) {
        block.stmts.clear();
    }

    fn visit_item_const_mut(&mut self, item: &mut ItemConst) {
        *item.expr = parse_quote!(_);
        visit_mut::visit_item_const_mut(self, item);
    }

    fn visit_item_static_mut(&mut self, item: &mut ItemStatic) {
        *item.expr = parse_quote!(_);
        visit_mut::visit_item_static_mut(self, item);
    }

    fn visit_impl_item_const_mut(&mut self, item: &mut ImplItemConst) {
        item.expr = parse_quote!(_);
        visit_mut::visit_impl_item_const_mut(self, item);
    }

    fn visit_receiver_mut(&mut self, receiver: &mut Receiver) {
        if receiver.reference.is_none() {
            receiver.mutability = None;
        }
    }

    fn visit_pat_ident_mut(&mut self, pattern: &mut PatIdent) {
        pattern.mutability = None;
    }
}
