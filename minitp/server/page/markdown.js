// ---- Markdown: paragraphs, headings, lists, code, bold and italics; only elements and text nodes, never HTML ----
const FENCE = /^ *(`{3,}|~{3,})([^`]*)$/, HEADING = /^ {0,3}(#{1,6})\s+(\S.*)$/, RULE = /^ {0,3}(?:([-*_]) *)(?:\1 *){2,}$/;
const ITEM = /^(\s*)(?!(?:[-*_] *){3,}$)([-*+•]|\d{1,9}[.)])( +|$)/;
const BEGINNING = /^\s*(?:[-*_]+|[+•]|\d{1,9}[.)]?|#{1,6}|`+|~+)?\s*$/;  // a last line that may still become any block
const DEEPEST = 8;  // levels of lists within lists; deeper ones are shown as text

function h(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}
const indentation = line => line.search(/\S|$/);
const startsBlock = line => [FENCE, HEADING, RULE, ITEM].some(pattern => pattern.test(line));

class Markdown {  // shows a growing text: only its last block is drawn again
  constructor(parent) { Object.assign(this, { parent, from: 0, done: 0 }); }
  show(text, isOpen) {  // `isOpen`: more text will follow, so the end of it may be half of a marker
    const lines = text.slice(this.from).split('\n');
    if (isOpen && BEGINNING.test(lines.at(-1))) lines.pop();
    const blocks = blocksOf(lines, isOpen), last = blocks.at(-1)?.at ?? 0;
    patch(this.parent, blocks.map(block => block.node), this.done);
    this.from += lines.slice(0, last).reduce((sum, line) => sum + line.length + 1, 0);
    this.done += Math.max(blocks.length - 1, 0);
  }
}
function patch(parent, wanted, from = 0) {  // makes the children equal to `wanted`; equal nodes, and selections in them, stay
  wanted.forEach((node, i) => {
    const old = parent.childNodes[from + i];
    if (!old) parent.append(node);
    else if (old.nodeName !== node.nodeName) old.replaceWith(node);
    else if (!(node instanceof Text)) patch(old, [...node.childNodes]);
    else if (node.data.startsWith(old.data)) old.appendData(node.data.slice(old.length));
    else old.data = node.data;
  });
  while (parent.childNodes.length > from + wanted.length) parent.lastChild.remove();
}

function blocksOf(lines, isOpen, depth = 0) {  // a list of { at: the first line, node: the element }
  const blocks = [];
  for (let at = 0, end; at < lines.length; at = end) {
    end = at + 1;
    const line = lines[at];
    if (!line.trim()) continue;
    let found, node;
    if ((found = FENCE.exec(line))) {
      const isEnd = other => other.trim().length >= found[1].length && !other.trim().replaceAll(found[1][0], '');
      while (end < lines.length && !isEnd(lines[end])) end++;
      const indent = indentation(line), code = lines.slice(at + 1, end++);
      node = codeBlock(found[2].trim(), code.map(one => one.slice(Math.min(indent, indentation(one)))).join('\n'));
    } else if ((found = HEADING.exec(line))) {
      node = h(`h${Math.min(found[1].length + 1, 6)}`, { dir: 'auto' }, inline(found[2], isOpen && end === lines.length));
    } else if (RULE.test(line)) {
      node = h('hr');
    } else if (depth < DEEPEST && ITEM.test(line)) {
      [node, end] = list(lines, at, isOpen, depth);
    } else {
      while (end < lines.length && lines[end].trim() && !(depth < DEEPEST && startsBlock(lines[end]))) end++;
      node = h('p', { dir: 'auto' }, inline(lines.slice(at, end).join('\n'), isOpen && end === lines.length));
    }
    blocks.push({ at, node });
  }
  return blocks;
}
function list(lines, from, isOpen, depth) {  // returns [the element, the line after the list]
  const [, { length: indent }, first] = ITEM.exec(lines[from]), isNumbered = mark => /\d/.test(mark);
  const node = isNumbered(first) ? h('ol', { start: parseInt(first), dir: 'auto' }) : h('ul', { dir: 'auto' });
  let at = from;
  for (let found; at < lines.length && (found = ITEM.exec(lines[at])); ) {
    if (found[1].length > indent || isNumbered(found[2]) !== isNumbered(first)) break;
    const width = found[0].length, item = [lines[at].slice(width)];
    for (at++; at < lines.length; at++) {
      const line = lines[at], own = indentation(line);
      if (line.trim() && own <= indent && (startsBlock(line) || !lines[at - 1].trim())) break;
      item.push(line.slice(Math.min(own, width)));
    }
    const blocks = blocksOf(item, isOpen && at === lines.length, depth + 1).map(block => block.node);
    const text = blocks[0]?.nodeName === 'P' ? [...blocks.shift().childNodes] : [];
    node.append(h('li', {}, ...text, ...blocks));
  }
  return [node, at];
}
function codeBlock(language, code) {
  const bar = h('div', { className: 'bar' }, h('span', {}, language), h('button', { type: 'button', className: 'small copy' }, 'Copy'));
  return h('div', { className: 'code' }, bar, h('pre', { dir: 'ltr', tabIndex: 0 }, h('code', {}, code)));
}

const MARKER = /\\([\\`*_~#+\-.!>])|(`+)|(\*+|_+)/g, isWord = text => /[\p{L}\p{N}]/u.test(text), isSpace = text => /\s/.test(text);
function inline(text, isOpen) {  // code, bold and italics; a marker without its other half formats what follows if `isOpen`, else it is text
  const root = document.createDocumentFragment(), open = [];  // open: markers without their other half so far, the outermost first
  const put = part => part && (open.at(-1)?.node ?? root).append(part);
  const close = i => open.splice(i).slice(1).forEach(unwrap);  // markers within the i-th have no other half
  let end = text.length, at = 0;
  while (isOpen && '*_`\\'.includes(text[end - 1] ?? '-')) end--;  // they may be half of a marker
  text = text.slice(0, end);
  function code(ticks) {
    const other = new RegExp(`(?<!\`)${ticks}(?!\`)`, 'g');
    other.lastIndex = at;
    const stop = other.exec(text)?.index ?? (isOpen ? end : -1);
    if (stop < 0) return put(ticks);
    const inner = text.slice(at, stop), isPadded = inner.startsWith(' ') && inner.endsWith(' ') && inner.trim();
    put(h('code', { dir: 'ltr' }, isPadded ? inner.slice(1, -1) : inner));
    at = stop + ticks.length;
  }
  function emphasis(run, before, after) {
    if (run.length > 3) return put(run);
    const isWhole = run[0] === '_';  // within a word, _ is not a marker
    const opens = !isSpace(after) && !(isWhole && isWord(before)), closes = !isSpace(before) && !(isWhole && isWord(after));
    let left = run.length;
    for (let i = open.length - 1; closes && left && i >= 0; i--) {
      const { mark } = open[i];
      if (mark[0] !== run[0] || (left < 3 && left !== mark.length)) continue;
      close(i);
      left -= mark.length;
    }
    for (const size of [[], [1], [2], [2, 1]][left]) opens ? begin(run.slice(0, size), !isWord(before)) : put(run.slice(0, size));
  }
  function begin(mark, atWord) {
    const same = open.findIndex(other => other.mark === mark);
    if (same >= 0) open.splice(same).forEach(unwrap);
    const node = h(mark.length === 2 ? 'strong' : 'em');
    put(node);
    open.push({ mark, node, atWord });
  }
  for (let found; (MARKER.lastIndex = at, found = MARKER.exec(text)); ) {
    put(text.slice(at, found.index));
    at = found.index + found[0].length;
    if (found[1]) put(found[1]);
    else if (found[2]) code(found[2]);
    else emphasis(found[3], text[found.index - 1] ?? ' ', text[at] ?? ' ');
  }
  put(text.slice(at));
  open.filter(marker => !(isOpen && marker.atWord)).forEach(unwrap);
  root.normalize();
  return root;
}
function unwrap({ mark, node }) {  // the marker is text after all
  node.before(mark);
  while (node.firstChild) node.before(node.firstChild);
  node.remove();
}
