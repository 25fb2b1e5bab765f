// The module tree, read off dotted paths: blocks of consecutive layers that share a path, and the lines that are shown.

const MOST_LEVELS = 4;

/**
 * Return the blocks of some layers: runs of at least two neighbours under one module, outermost first.
 *
 * Layers stand in the order of the calls, so a module that is left and met again has a block for each time.
 */
function blocksOf(names) {
  const blocks = [];
  addBlocks(
    names.map((name) => name.split(".")),
    0,
    names.length,
    0,
    null,
    blocks,
  );
  return blocks;
}

function addBlocks(paths, from, to, depth, parent, blocks) {
  for (let start = from; start < to;) {
    const segment = paths[start][depth];
    let end = start + 1;
    while (end < to && segment !== undefined && paths[end][depth] === segment) end += 1;
    if (end - start > 1) {
      const block = blockIn(paths, start, end, depth, parent, blocks);
      if (block) addBlocks(paths, start, end, depth + 1, block, blocks);
    }
    start = end;
  }
}

/** A module that holds nothing but one other module is shown with it, as one block. */
function blockIn(paths, start, end, depth, parent, blocks) {
  const path = paths[start].slice(0, depth + 1).join(".");
  if (parent && parent.from === start && parent.to === end) {
    parent.label += `.${paths[start][depth]}`;
    parent.path = path;
    return parent;
  }
  const level = parent ? parent.level + 1 : 0;
  if (level === MOST_LEVELS) return null;
  const block = { path, label: paths[start][depth], from: start, to: end, level };
  blocks.push(block);
  return block;
}

/** The key by which a block stays collapsed when others come and go. */
function keyOf(block, layers) {
  return `${block.path}@${layers[block.from]}`;
}

/** The outermost blocks that divide the layers: one that holds nearly all of them, and others, is no division. */
function divisionOf(blocks, number) {
  const hasOthers = (block) => blocks.some((one) => holds(block, one));
  return outermostOf(blocks.filter((block) => block.to - block.from < 0.9 * number || !hasOthers(block)));
}

function holds(block, other) {
  return block !== other && block.from <= other.from && block.to >= other.to;
}

function outermostOf(blocks) {
  return blocks.filter((block) => !blocks.some((other) => holds(other, block)));
}

/**
 * Return what is shown of some layers: a line for each, or for a collapsed module one for all of its layers.
 *
 * @param {number[]} layers numbers of the layers, in the order of the calls
 * @param {Set<string>} collapsed keys of collapsed blocks
 */
function linesOf(view, layers, collapsed) {
  const names = layers.map((layer) => data.layers[layer]);
  const blocks = blocksOf(names);
  const outermost = outermostOf(blocks.filter((block) => collapsed.has(keyOf(block, layers))));
  const lines = [];
  const lineAt = [];
  for (let i = 0; i < layers.length;) {
    const block = outermost.find((one) => one.from === i);
    const end = block ? block.to : i + 1;
    lines.push(block ? moduleLine(view, layers, block) : layerLine(view, layers, names[i], blocks, i));
    for (; i < end; i += 1) lineAt.push(lines.length - 1);
  }
  const isHidden = (block) => outermost.some((other) => holds(other, block));
  const shown = blocks
    .filter((block) => !isHidden(block))
    .map((block) => ({
      ...block,
      key: keyOf(block, layers),
      isClosed: outermost.includes(block),
      top: lineAt[block.from],
      bottom: lineAt[block.to - 1] + 1,
    }));
  return { lines, blocks: shown, division: divisionOf(blocks, layers.length).map((block) => keyOf(block, layers)) };
}

function layerLine(view, layers, name, blocks, i) {
  const layer = layers[i];
  const around = blocks.filter((block) => block.from <= i && i < block.to);
  const inner = around[around.length - 1];
  const label = inner && name.startsWith(`${inner.path}.`) ? name.slice(inner.path.length + 1) : name.split(".").pop();
  return {
    name,
    label: inner ? label : name,
    tail: tailOf(name, blocks, layers.length),
    members: [view.at.get(layer)],
    layers: [layer],
    level: around.length,
  };
}

/** A name without the module that holds nearly all layers: where few names have room, each says where it is. */
function tailOf(name, blocks, number) {
  const most = blocks.find((block) => block.to - block.from > 0.5 * number);
  return most && name.startsWith(`${most.path}.`) ? name.slice(most.path.length + 1) : name;
}

function moduleLine(view, layers, block) {
  const inside = layers.slice(block.from, block.to);
  const label = `${block.label} \u00b7 ${inside.length} layers`;
  return {
    name: block.path,
    label,
    tail: label,
    members: inside.map((layer) => view.at.get(layer)),
    layers: inside,
    level: block.level + 1,
    isModule: true,
  };
}

/** Cut a name in its middle: its beginning tells modules apart, its end the parts of a module. */
function cut(name, width) {
  if (name.length <= width || width < 3) return name;
  const head = Math.floor((width - 1) / 3);
  return `${name.slice(0, head)}\u2026${name.slice(name.length - (width - 1 - head))}`;
}
