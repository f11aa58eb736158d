// ---- the numbers of one step ----
const td = (content, attributes) => h('td', attributes, h('bdi', {}, content));
const headings = names => h('thead', {}, h('tr', {}, names.map(name => h('th', { scope: 'col' }, name))));
const indexText = index => index?.join(', ') || '–';

function errorTable(cell) {
  const errors = [['local', cell.local], [comparing ? 'difference' : 'total', cell.total]].filter(([, error]) => error);
  const lines = [
    ['relative error', error => brief(error.relative)], ['its bound', error => brief(error.bound)],
    ['share of its bound', error => brief(error.share)], ['largest absolute', error => brief(error.absolute)],
    ['its bound', error => brief(error.absoluteBound)], ['at index', error => indexText(error.index)],
    ['in the tensor', error => indexText(error.index && wholeIndex(cell, error.index))],
  ].map(([label, text]) => [label, errors.map(([, error]) => text(error))]);
  const told = lines.filter(([, texts]) => texts.some(text => text !== '–'));
  return h('table', {}, headings(['', ...errors.map(([name]) => name)]), h('tbody', {},
    told.map(([label, texts]) => h('tr', {}, h('th', { scope: 'row' }, label), texts.map(text => td(text))))));
}
function wholeIndex(cell, index) {  // the index in the checkpoint's tensor of an element of a rank's slice
  const tensor = isTensor(cell.row, cell.col) && planned(stepOf(cell.row, cell.col)), start = tensor?.ranges?.[cell.rank]?.[0];
  return start ? index.map((i, axis) => axis === tensor.axis ? i + start : i) : null;
}
function worstTable(cell) {
  const axes = data.axes[stepOf(cell.row, cell.col)]?.split(' ');
  const lines = cell.worst.map(([index, value, expected]) => h('tr', {}, td(indexText(index)), td(full(real(value))),
    td(full(real(expected))), td(brief(real(value) - real(expected)))));
  const names = [axes ? `[${axes.join(', ')}]` : 'index', ...(comparing ? ['B', 'A'] : ['value', 'expected']), 'difference'];
  return [h('h3', {}, 'Worst elements'), h('div', { class: 'scroll' }, h('table', {}, headings(names), h('tbody', {}, lines)))];
}
function onEachRank(cell) {  // [view, the cell of the same step and pass on its rank], for each rank
  const at = { ...state, row: cell.row, col: cell.col, pass: cell.pass ?? state.pass };
  return views.flatMap((view, v) => {
    const found = view.rank === 'worst' || view.rank === null ? null : cellAt({ ...at, view: v });
    return found ? [[v, found]] : [];
  });
}
function ranksTable() {
  const shown = cellAt(state), lines = onEachRank(shown).map(([v, cell]) => {
    const onclick = () => show({ ...placeOf(cell), view: v });
    const button = h('button', { type: 'button', 'aria-label': `show rank ${views[v].rank}`, onclick }, views[v].label);
    return h('tr', { class: cell === shown ? 'here' : null }, h('td', {}, button), td(brief(cell.local?.relative)),
      td(brief(cell.bounded?.share)), td(brief(cell.total?.relative)), td(cell.ok ? '✓' : '✕', { class: cell.ok ? 'ok' : 'wrong' }));
  });
  if (lines.length < 2) return [];
  return [h('h3', {}, isTensor(state.row, state.col) ? 'The same tensor on each rank' : 'The same step on each rank'),
    h('table', {}, headings(['rank', 'local', 'of bound', 'total', '']), h('tbody', {}, lines))];
}
function wrongButtons() {  // buttons to the wrong steps before and after this one
  const here = order(cellAt(state) ?? { ...state, pass: shownPass(state) % Math.max(1, data.passes.length), rank: null });
  const before = wrong.findLast(cell => order(cell) < here), after = wrong.find(cell => order(cell) > here);
  const button = (cell, text) => h('button', { type: 'button', disabled: cell ? null : '',
    onclick: () => show({ ...placeOf(cell), view: viewOf(cell) }, true) }, text);
  if (!before && !after) return [];
  return [h('div', { class: 'steps' }, button(before, '‹ previous wrong'), button(after, 'next wrong ›'))];
}
function sliceText(step, rank) {  // the part of a tensor that a rank holds
  const tensor = planned(step);
  if (!tensor || tensor.axis === null || rank === null) return tensor?.axis === null && data.tp > 1 ? 'whole on each rank' : '';
  return `axis ${tensor.axis}, ${tensor.ranges[rank]?.join(' to ')}`;
}
function explained(step, rank) {  // the sentence, formula, shape, operation and source of a step or a tensor
  const [shape, formula, operation, sentence, source] = explainedBy(step) ?? [], reader = data.readers?.[step];
  if (!sentence) return [];
  const part = tensors.has(step) ? sliceText(step, rank) : '', parts = [shape, part, operation, source].filter(Boolean);
  return [h('p', { class: 'sentence' }, sentence + (reader ? ` Read by ${reader}.` : '')),
    h('p', { class: 'formula' }, h('span', {}, formula)), h('p', { class: 'formula soft' }, parts.map(text => h('span', {}, text)))];
}
let folded = true;  // on a phone the sheet starts as one line
function fold(now) {
  folded = now;
  $('detail').classList.toggle('folded', folded);
  const button = document.querySelector('#detail .fold');
  button?.setAttribute('aria-expanded', !folded);
  button?.setAttribute('aria-label', folded ? 'show the numbers' : 'hide the numbers');
}
function noteOf(cell) {  // without the diagnosis, which is above the map
  return cell === guilty && data.diagnosis ? cell.note.replace(data.diagnosis, '').replace(/; $/, '') : cell.note;
}
function statusOf(cell) {
  if (cell.ok) return '✓ within bounds';
  if (cell !== guilty) return `✕ ${outOfBounds(cell)}`;
  return `✕ the first ${fault} ${isTensor(cell.row, cell.col) ? 'tensor' : 'step'}`;
}
function rankText(cell) {
  if (cell === guilty && data.everywhere) return 'all ranks';
  const worst = views[state.view].rank === 'worst' && cell !== guilty && cell.rank !== null;
  return rankName(cell.rank) + (worst ? ' (the worst)' : '');
}
function drawDetail() {
  const cell = cellAt(state), name = h('h2', { class: 'name' }, h('bdi', {}, breakable(fullName(state))));
  const mark = !cell ? '' : h('span', { class: cell.ok ? 'mark ok' : 'mark wrong', 'aria-hidden': 'true' }, cell.ok ? '✓' : '✕');
  const bar = h('div', { class: 'sheet-bar' }, mark, name,
    h('button', { type: 'button', class: 'fold', onclick: () => fold(!folded) }, h('i')),
    h('button', { type: 'button', class: 'close', 'aria-label': 'close', onclick: () => { $('detail').hidden = true; } }, '×'));
  const numbers = !cell ? [h('p', { class: 'soft' }, 'Not recorded.')] : [
    h('p', { class: 'tags' }, h('span', { class: cell.ok ? 'ok' : 'wrong' }, statusOf(cell)), h('span', {}, rankText(cell)),
      h('span', { class: 'soft' }, h('bdi', {}, cell.kind)))];
  if (cell?.onlyTotal) numbers.push(h('p', { class: 'note' }, 'The local error is within its bound, and the total error is not.'));
  if (cell && noteOf(cell)) numbers.push(h('p', { class: 'note' }, h('bdi', {}, noteOf(cell))));
  numbers.push(...pictures(cell), ...explained(stepOf(state.row, state.col), cell?.rank ?? null));
  if (cell) numbers.push(h('h3', {}, 'Errors'), errorTable(cell), ...(cell.worst.length ? worstTable(cell) : []), ...ranksTable());
  $('detail').hidden = false;
  $('detail').replaceChildren(bar, ...numbers, ...wrongButtons(), ...(cell ? [h('p', { class: 'hint keys' }, 'Arrow keys move through the map.')] : []));
  fold(folded);
}
