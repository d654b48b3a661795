# SPDX-License-Identifier: LGPL-2.1-or-later
"""The differences between generations, as traits: code above `khod.kernel` asks for these, never for the generation."""

from typing import TYPE_CHECKING

from khod.dataclass import dataclass
from khod.deferred import defer_module
from khod.errors import MalformedTree
from khod.kernel.protocol import Tree
from khod.model import Generation

if TYPE_CHECKING:
    from khod.abi import fdt
else:
    fdt = defer_module("khod.abi.fdt")


@dataclass(frozen=True)
class Traits:
    """The traits of a generation, which may also be that of an earlier kernel of this host.

    `one_tree`: producers are nodes of the root, which names each page (v3); later each has a blob of its own.
    `copies_tree`: kexec_file_load(2) copies the tree into the image, after the kernel has allocated it in one piece
    (v3); later generations pass on an address. `has_parameter`: `kho=` switches it on (mainline). `debugfs_writes`: it
    is driven by writing a debugfs file (6.16 to 7.0), which lockdown forbids: debugfs_locked_down() in
    fs/debugfs/file.c.
    """

    one_tree: bool = False
    copies_tree: bool = False
    has_parameter: bool = True
    debugfs_writes: bool = False


_OTHERS = Traits()
_TRAITS = {
    Generation.sysfs: Traits(one_tree=True, copies_tree=True, has_parameter=False),
    Generation.finalize: Traits(debugfs_writes=True),
    Generation.finalize_no_abort: Traits(debugfs_writes=True),
}


def traits_of(generation: Generation) -> Traits:
    """Return the traits of a generation; without KHO, those of the later ones."""
    return _TRAITS.get(generation, _OTHERS)


def kernel_producers(tree: Tree, generation: Generation) -> dict[str, object]:
    """Return each kernel producer's state by name, in a form that compares with another tree of that generation."""
    if not traits_of(generation).one_tree:
        return dict(tree.blobs)
    try:
        return {child.name: child for child in fdt.parse_tree(tree.root).children}
    except MalformedTree:
        return {"/": tree.root}
