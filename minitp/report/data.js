'use strict';
// ---- small tools: elements are made with text nodes only, so no string of the data is ever markup ----
const $ = id => document.getElementById(id);
const root = document.documentElement;

function make(space, tag, attributes, children) {
  const element = space ? document.createElementNS(space, tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes ?? {})) {
    if (key.startsWith('on')) element.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value);
  }
  element.append(...children.flat(2).filter(child => child !== null && child !== undefined));
  return element;
}
const h = (tag, attributes, ...children) => make(null, tag, attributes, children);
const s = (tag, attributes, ...children) => make('http://www.w3.org/2000/svg', tag, attributes, children);
const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
const range = n => Array.from({ length: n }, (_, i) => i);
const real = x => typeof x === 'string' ? { inf: Infinity, '-inf': -Infinity }[x] ?? NaN : x;  // JSON has no NaN
const icon = ok => s('svg', { viewBox: '0 0 14 14', 'aria-hidden': 'true' },
  s('path', { d: ok ? 'M2 7.5 5.5 11 12 3.5' : 'M3 3 11 11M11 3 3 11' }));
const breakable = text => text.split(/(?<=[./])/).flatMap(part => [part, h('wbr')]);  // long names break at dots

const plain = number => number.replace('+', '');  // 1e+5 is 1e5
function brief(x) {  // an error: 3.1e-7
  if (x === null || x === undefined) return '–';
  if (!Number.isFinite(x)) return Number.isNaN(x) ? 'NaN' : x > 0 ? 'inf' : '-inf';
  return x !== 0 && (Math.abs(x) < 0.01 || Math.abs(x) >= 1e4) ? plain(x.toExponential(1)) : String(+x.toPrecision(2));
}
function full(x) {  // an element of a tensor
  if (x === null || x === undefined || !Number.isFinite(x)) return brief(x);
  return x !== 0 && (Math.abs(x) < 1e-4 || Math.abs(x) >= 1e7) ? plain(x.toExponential(4)) : String(+x.toPrecision(7));
}
const count = n => String(n).replace(/\B(?=(\d{3})+$)/g, '\u202f');
const plural = (n, one) => `${count(n)} ${one}${n === 1 ? '' : 's'}`;

// ---- the data ----
const data = JSON.parse($('data').textContent);
const comparing = data.command === 'compare', fault = comparing ? 'differing' : 'wrong';
const first = data.before.length, end = first + data.layers, rows = end + data.after.length;
// The columns are the tensors of a layer, then its steps. A row outside the layers has at most two cells: a tensor,
// in column 0, and a step, in column `wide`.
const weights = data.weights ?? [], beside = data.beside ?? {}, wide = data.steps.length ? weights.length : 0;
const columns = Math.max(1, weights.length + data.steps.length);
const isWide = row => row < first || row >= end;
const outer = row => row < first ? data.before[row] : data.after[row - end];
const colOf = (row, col) => !isWide(row) ? col : col < wide && beside[outer(row)] ? 0 : wide;
const colsOf = row => !isWide(row) ? range(columns) : colOf(row, 0) < wide ? [0, wide] : [wide];
const isTensor = (row, col) => isWide(row) ? colOf(row, col) < wide : col < weights.length;
const stepOf = (row, col) => isWide(row) ? (isTensor(row, col) ? beside[outer(row)] : outer(row))
  : weights[col] ?? data.steps[col - weights.length];
const inLayer = (name, layer) => name.replace('*', layer);  // a general name has a * for the layer
function nameOf(row, col) {
  if (isTensor(row, col)) return `weights/${inLayer(stepOf(row, col), row - first)}`;
  return isWide(row) ? outer(row) : `layers.${row - first}.${stepOf(row, col)}`;
}
const shortTensor = name => name.replace(/\.weight$/, '').split('.').slice(/\.bias$/.test(name) ? -2 : -1).join('.')
  .replace('_layernorm', '_norm').replace('attention', 'attn').replace('feedforward', 'ffn');
const rankName = rank => rank === null ? (data.tp ? 'all ranks' : '') : `rank ${rank}`;

function openError(packed) {
  if (!packed) return null;
  const [relative, bound, absolute, absoluteBound, index] = packed.map(real);
  // The larger share of the two bounds; an error of 0 is no share of any bound, and any other error exceeds a bound of 0.
  const shares = [[relative, bound], [absolute, absoluteBound]].filter(pair => !pair.includes(null))
    .map(([error, most]) => error === 0 ? 0 : error / most);
  const share = shares.length ? Math.max(...shares) : null;
  return { relative, bound, absolute, absoluteBound, index, share };
}
const exceeds = error => error !== null && error.share !== null && !(error.share <= 1);
const cells = data.cells.map(([pass, row, col, rank, kind, ok, local, total, worst, note, name], number) => {
  const cell = { number, pass, row, col, rank, kind, ok: ok === 1, local: openError(local), total: openError(total), worst, note };
  cell.name = name ? `weights/${name}` : null;
  cell.onlyTotal = !cell.ok && cell.local !== null && !exceeds(cell.local) && exceeds(cell.total);
  // The error that decides: the local one, unless only the total one is out of bounds or there is no local one.
  cell.bounded = cell.onlyTotal || !cell.local && cell.total?.bound != null ? cell.total : cell.local;
  return cell;
});
// The position of a cell in the run; weights come before all passes. All ranks compute a step at the same time, so they
// are ordered by number.
const order = ({ pass, row, col, rank }) => (((pass ?? -1) * rows + row) * columns + (isWide(row) ? 0 : col)) * (data.tp ?? 1) + (rank ?? 0);
const wrong = cells.filter(cell => !cell.ok).sort((a, b) => order(a) - order(b));
const guilty = cells[data.blamed ?? -1] ?? null;
const modes = [
  { id: 'share', label: comparing ? 'Difference / tolerance' : 'Local error / bound',
    of: cell => cell.bounded?.share ?? null },
  { id: 'total', label: comparing ? 'Relative difference' : 'Total error',
    of: cell => cell.total?.relative ?? null },
].filter(mode => cells.some(cell => mode.of(cell) !== null));
if (!modes.length) modes.push({ id: 'share', label: 'Within bounds', of: () => null });

function decades(of, widest) {  // the range of a log scale: all but the smallest few values, and not too wide
  const sizes = cells.map(of).filter(x => x > 0 && x < Infinity).sort((a, b) => a - b);
  if (!sizes.length) return [-widest, 0];
  const high = Math.min(2, Math.ceil(Math.log10(sizes.at(-1))));
  return [clamp(Math.floor(Math.log10(sizes[Math.floor(sizes.length / 50)])), high - widest, high - 1), high];
}
const totals = decades(cell => cell.total?.relative, 10);
// Shares of the bound: below CALM an error is far from it and pale, and above WARM the color is warm.
const CALM = 0.6, WARM = 0.8, PALE = 0.4;  // PALE: the place of CALM on the ramp
const INKS = [0.5, 0.65];  // places on the ramp of total errors from which text has the colors for dark and darkest cells

// Views: each rank alone and, if there are several, the worst rank of each step. The same for passes.
const views = data.tp ? range(data.tp).map(rank => ({ rank, label: String(rank) })) : [{ rank: null, label: '' }];
if (data.tp > 1) views.unshift({ rank: 'worst', label: 'worst' });
const severalPasses = data.passes.length > 1, anyPass = severalPasses ? data.passes.length : 0;
const passes = severalPasses ? [...data.passes, 'all passes'] : data.passes;

const viewOf = cell => views.length > 1 && cell.rank !== null ? cell.rank + 1 : 0;

function severity(cell, mode) {  // a wrong step is worse than any step within bounds; NaN is worst
  const size = mode.of(cell) ?? -1;
  return (cell.ok || mode.id === 'total' ? 0 : 1e6) + (Number.isNaN(size) ? Infinity : size);
}
function arrange(mode) {  // for each pass and view, the number of the cell at each place of the map, or -1
  const grids = passes.map(() => views.map(() => new Int32Array(rows * columns).fill(-1)));
  const put = (grid, cell) => {
    const place = cell.row * columns + cell.col, other = cells[grid[place]];
    if (!other || cell === guilty || other !== guilty && severity(cell, mode) > severity(other, mode)) grid[place] = cell.number;
  };
  const every = range(views.length), some = views.map((view, v) => views.length > 1 ? [0, v] : [0]);  // the first view has all ranks
  for (const cell of cells) {
    const seen = cell.rank === null ? every : some[viewOf(cell)];
    for (const pass of cell.pass === null ? passes.keys() : severalPasses ? [cell.pass, anyPass] : [cell.pass])
      for (const v of seen) put(grids[pass][v], cell);
  }
  return grids;
}
const arranged = new Map(modes.map(mode => [mode.id, arrange(mode)]));
function cellAt(at) {
  const grid = arranged.get(at.mode.id)[at.pass]?.[at.view];
  return cells[grid?.[at.row * columns + colOf(at.row, at.col)] ?? -1];
}
function fullName(at, cell = at.mode ? cellAt(at) : at) {  // at: a cell, or a place of the map
  if (cell?.name) return cell.name;
  const pass = data.passes[cell?.pass ?? at.pass];
  return (pass && !isTensor(at.row, at.col) ? `${pass}/` : '') + nameOf(at.row, at.col);
}

function tone(cell, mode) {  // how a cell is drawn: its class, its place on the ramp, and its number
  if (!cell) return { look: 'none', t: 0, size: null };
  const size = mode.of(cell);
  if (mode.id === 'share' && !cell.ok) return { look: 'bad', t: 1, size };
  if (size === null) return { look: 'none', t: 0, size };
  if (!Number.isFinite(size)) return { look: 'bad', t: 1, size };
  if (mode.id === 'share' && cell.bounded.bound === 0) return { look: 'exact', t: 0, size };
  if (mode.id === 'share' && size > WARM) return { look: 'warm', t: (size - WARM) / (1 - WARM), size };
  if (mode.id === 'share')
    return { look: '', t: size < CALM ? PALE * size / CALM : PALE + (1 - PALE) * (size - CALM) / (WARM - CALM), size };
  const [low, high] = totals, t = size > 0 ? clamp((Math.log10(size) - low) / (high - low), 0, 1) : 0;
  return { look: cell.ok ? '' : 'marked', t, size };
}

// ---- what is shown now ----
const closest = cells.reduce((best, cell) => !best || severity(cell, modes[0]) > severity(best, modes[0]) ? cell : best, null);
const state = { mode: modes[0], pass: anyPass, view: 0, row: 0, col: 0 };
const shownPass = at => severalPasses && at.pass === anyPass ? cellAt(at)?.pass ?? anyPass : at.pass;
const placeOf = ({ pass, row, col }) => ({ pass: pass ?? state.pass, row, col });

function show(changes, focus = false) {
  const before = { ...state };
  Object.assign(state, changes);
  if (state.mode !== before.mode) { drawModes(); drawLegend(); drawThumbs(); }
  const repaint = ['mode', 'pass', 'view'].some(key => state[key] !== before[key]);
  if (repaint) paintMap();
  if (repaint || shownPass(state) !== shownPass(before)) drawGrowth();
  markSelection(before, focus);
  markLayer();
  markThumbs();
  drawDetail();
}
