// ---- light and dark ----
const isNarrow = () => innerWidth <= 900;  // as in style.css
const prefersDark = matchMedia('(prefers-color-scheme: dark)');
const isDark = () => (root.style.colorScheme || (prefersDark.matches ? 'dark' : 'light')) === 'dark';
function setTheme(theme) {  // '' follows the system
  root.style.colorScheme = theme;
  ramp = null;
  $('theme').replaceChildren(isDark() ? '☼' : '☾', h('span', {}, isDark() ? ' Light' : ' Dark'));
  if (places.length) { drawThumbs(); drawDetail(); }
}
function followTheme() {
  $('theme').addEventListener('click', () => setTheme(isDark() ? 'light' : 'dark'));
  prefersDark.addEventListener('change', () => setTheme(root.style.colorScheme));
  let kept = '';
  addEventListener('beforeprint', () => { kept = root.style.colorScheme; setTheme('light'); $('run').open = true; });
  addEventListener('afterprint', () => { setTheme(kept); $('run').open = !isNarrow(); });
}

const FEW_LAYERS = 8;
function startMap() {
  const begin = guilty ?? closest;
  Object.assign(state, { row: begin.row, col: begin.col });
  if (guilty) Object.assign(state, placeOf(guilty), { view: data.everywhere ? 0 : viewOf(guilty) });  // its pass and rank
  drawModes(); buildMap(); drawLegend(); drawThumbs(); paintMap(); markSelection(state, false); drawDetail(); drawLayer(); markLayer();
  if (data.layers < FEW_LAYERS) $('left').append($('growth-section'));  // a short map leaves room below it
  drawGrowth();
  const now = placeAt(state), box = $('map');  // on a phone the map scrolls inside its box; show the selected step
  if (now.offsetLeft + 60 > box.clientWidth) box.scrollLeft = now.offsetLeft - box.clientWidth / 2;
  if (now.offsetTop + 60 > box.clientHeight) box.scrollTop = now.offsetTop - box.clientHeight / 2;
}
function start() {
  $('head').hidden = $('main').hidden = false;
  drawHead(); followTheme(); setTheme('');
  if (cells.length) startMap();
  else $('errors-section').hidden = $('growth-section').hidden = true;  // the plan is wrong, so nothing was run
  drawPlan(); drawTensors();
  let width = innerWidth;
  addEventListener('resize', () => {
    if (innerWidth === width) return;
    width = innerWidth;
    $('run').open = !isNarrow();
    if (cells.length) { drawGrowth(); $('detail').hidden = false; }
    drawPlan(); hintAtScrolling();
  });
  root.dataset.ready = Math.round(performance.now());
}
start();
