// ---- small maps to choose a pass and a rank ----
const MANY_PASSES = 2;  // more of them get lower maps without numbers
const THUMBS_HEAD = 18;  // CSS pixels of the line of ranks, which stays at the top
const thumbLines = [  // the lines of the table: what each shows, its first column and the column after its last
  ...(severalPasses ? [{ label: 'all', pass: anyPass, from: 0, to: columns }] : []),
  ...(weights.length ? [{ label: 'weights', pass: null, from: 0, to: weights.length }] : []),
  ...data.passes.map((label, pass) => ({ label: label || 'all', pass, from: weights.length, to: columns })),
];
const runOf = name => name.replace(/\.(seq)?\d+$/, '');  // decode of decode.12, batch.3 of batch.3.seq1

function drawThumbs() {
  $('select').hidden = views.length * data.passes.length < 2;
  if ($('select').hidden) return;
  const several = views.length > 1, many = data.passes.length > MANY_PASSES;
  const head = several ? [h('span', { class: 'head' }), ...views.map(view => h('span', { class: 'head' }, view.label))] : [];
  const lines = thumbLines.flatMap((line, i) => {
    const begins = many && i && runOf(line.label) !== runOf(thumbLines[i - 1].label) ? 'begins' : '';
    return [h('span', { class: `pass ${begins}` }, h('bdi', {}, line.label)), ...views.map((view, v) => makeThumb(line, v, begins, many))];
  });
  const style = `grid-template-columns: max-content minmax(32px, 74px)${several ? ` repeat(${views.length - 1}, minmax(26px, 74px))` : ''}`;
  const title = several ? 'Pass and rank' : 'Pass';
  const table = h('div', { class: many ? 'thumbs many' : 'thumbs', style }, head, lines), old = document.querySelector('.thumbs');
  const scrolled = old?.scrollTop ?? 0;
  $('select').replaceChildren(h('h3', {}, many ? `${title}: ${data.passes.length} passes` : title), table);
  table.scrollTop = scrolled;
  markThumbs();
}
const isIn = ({ from, to }, row, col) => spanOf(row, col) > 0 && col >= from && col < to;  // whether a line shows a cell
function cellsOf(line, view) {  // [row, column, cell] of all cells that a line shows
  const at = { ...state, pass: line.pass ?? state.pass, view };
  return range(rows).flatMap(row => colsOf(row).filter(col => isIn(line, row, col)).map(col => [row, col, cellAt({ ...at, row, col })]));
}
function makeThumb(line, view, begins, many) {
  const shown = cellsOf(line, view), wrongs = shown.filter(([, , cell]) => cell && !cell.ok), tensors = line.pass === null;
  const rank = views[view].rank === 'worst' ? 'worst over ranks' : rankName(views[view].rank);
  const canvas = h('canvas', { width: (line.to - line.from) * 3, height: rows * 3 });
  paintThumb(canvas, line, shown);
  const name = passes[line.pass] ?? line.label, text = `${name} ${rank}: ${wrongs.length} out of bounds`;
  const onclick = () => {
    const [row, col] = (wrongs.length ? wrongs : shown)[0] ?? [state.row, state.col];
    show(tensors ? { view, row, col } : { pass: line.pass, view });
  };
  return h('button', { type: 'button', 'aria-label': text, title: text, class: `${wrongs.length ? 'wrong' : ''} ${begins}`, onclick,
    'data-line': thumbLines.indexOf(line), 'data-view': view }, canvas,
    h('span', {}, !wrongs.length ? '✓' : many ? String(wrongs.length) : `✕ ${wrongs.length}`));
}
function markThumbs() {
  const tensor = isTensor(state.row, state.col) && weights.length > 0;
  for (const button of document.querySelectorAll('.thumbs button')) {
    const line = thumbLines[button.dataset.line], shown = line.pass === null ? tensor : !tensor && line.pass === state.pass;
    button.setAttribute('aria-pressed', shown && +button.dataset.view === state.view);
  }
  const table = document.querySelector('.thumbs'), pressed = document.querySelector('.thumbs [aria-pressed=true]');
  if (!pressed) return;
  const box = table.getBoundingClientRect(), { top, bottom } = pressed.getBoundingClientRect();
  if (top < box.top + THUMBS_HEAD || bottom > box.bottom) table.scrollTop += top - box.top - box.height / 2;
}
let ramp = null;  // the colors of the ramp as the canvas needs them; null when the theme or the mode has changed
function readRamp() {
  const probe = h('i', { class: 'cell', hidden: '' });
  document.body.append(probe);
  const read = (look, t) => {
    probe.className = `cell ${look}`;
    probe.style.setProperty('--t', t);
    return getComputedStyle(probe).backgroundColor;
  };
  const shades = look => range(33).map(i => read(look, i / 32));
  const colors = { '': shades(''), marked: shades('marked'), warm: shades('warm'), bad: read('bad', 0), exact: read('exact', 0) };
  probe.remove();
  return { ...colors, mode: state.mode };
}
function paintThumb(canvas, line, shown) {
  if (ramp?.mode !== state.mode) ramp = readRamp();
  const context = canvas.getContext('2d'), late = [];
  context.clearRect(0, 0, canvas.width, canvas.height);
  for (const [row, col, cell] of shown) {
    const { look, t } = tone(cell, state.mode), box = [(col - line.from) * 3, row * 3, spanOf(row, col) * 3, 3];
    if (look === 'none') continue;
    if (look === 'bad' || look === 'marked') late.push(box);
    context.fillStyle = look === 'exact' ? ramp.exact : ramp[look === 'bad' ? '' : look][Math.round(t * 32)];
    context.fillRect(...box);
  }
  const [x, y] = [canvas.width / 24, canvas.height / 16];  // wrong steps are drawn larger, or they would be too small to see
  context.fillStyle = ramp.bad;
  for (const [left, top, width, height] of late) context.fillRect(left - x, top - y, width + 2 * x, height + 2 * y);
}
